"""What all tests share: one list at the end of what was left out, and why.

A test that cannot run here skips itself with the reason ("no GPU", "no Slurm", ...). With A3PO_REQUIRE_ALL=1 a
left-out test is a failure, except for a missing GPU or Triton: that is how CI knows that it ran everything. Slow
tests are not part of it; they are listed as left out all the same.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says more of the machine's load than of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

ROOT = Path(__file__).parent.parent
NO_GPU = "no GPU"
NO_TRITON = "no Triton, which torch's CPU build lacks: `make test-newest` has it"
OTHER_PAIR = "needs the newest megatron-core: `make test-newest` runs it"
SLOW = "slow: `make test-slow` runs it"
NUM_SLOW = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """What a test draws without a seed of its own is the same in every run."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(1)


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The one real vLLM server of a session, and what is needed to ask it: a tests.vllm_server.VllmServer."""
    from tests.vllm_server import serve

    yield from serve(tmp_path_factory.mktemp("vllm"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write tests/golden/ anew from what this run computes",
    )


def missing_gpu() -> str | None:
    """Why tests marked `gpu` cannot run, if so."""
    import torch

    return None if torch.cuda.is_available() else NO_GPU


def missing_newest() -> str | None:
    """Why tests marked `newest` cannot run, if so."""
    return None if version("megatron-core").startswith("0.19") else OTHER_PAIR


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in (("gpu", missing_gpu), ("newest", missing_newest)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_deselected(items: list[pytest.Item]) -> None:
    # `-k` deselects in a call of its own, and what it leaves out was not asked for; `--last-failed` may leave out none.
    if items and all(item.get_closest_marker("slow") for item in items):
        items[0].config.stash[NUM_SLOW] = len(items)


def left_out(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Reason -> number of tests, from every report that skipped."""
    reports = reporter.stats.get("skipped", [])
    reasons = [
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        for report in reports
    ]
    return Counter(reason.removeprefix("Skipped: ") for reason in reasons)


def is_failure(reason: str) -> bool:
    """Whether leaving a test out for this reason fails a run that requires everything."""
    return os.environ.get("A3PO_REQUIRE_ALL") == "1" and not reason.startswith(
        (NO_GPU, NO_TRITON, OTHER_PAIR)
    )


def newest_pair() -> str | None:
    """What to say of the second supported pair of Python and Megatron-Core, after a run of all tests."""
    if missing_newest() is None:
        return None
    found = subprocess.run(
        [ROOT / "tools/find_python.sh", "3.12"], capture_output=True, text=True, check=False
    ).stdout
    how = (
        f"`make test-newest` runs them with {found.strip()}" if found else "no second Python (3.12 or newer)"
    )
    return f"the tests on the newest megatron-core: {how}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and exitstatus == pytest.ExitCode.OK and any(map(is_failure, left_out(reporter))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = [
        f"{'FAILED, everything is required: ' if is_failure(reason) else ''}{count} x {reason}"
        for reason, count in left_out(terminalreporter).most_common()
    ]
    if num_slow := config.stash.get(NUM_SLOW, 0):
        lines.append(f"{num_slow} x {SLOW}")
    runs_all = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if runs_all and (line := newest_pair()):
        lines.append(line)
    terminalreporter.section("left out on this machine")
    for line in lines or ["nothing"]:
        terminalreporter.line(line)
