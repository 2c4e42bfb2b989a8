"""Servers that register themselves, with a stand-in for vLLM that starts at once; real ones in tests/slurm/."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_a3po.rollout.vllm import recipe
from megatron_a3po.rollout.vllm.places import PLUGIN, new_token_file
from tests.trainer.replay import Replays
from tests.vllm_stand_in import write_stand_in


class Site:
    """A folder that servers register in, and the processes that do."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "servers"
        write_stand_in(root)
        new_token_file(root / "token")
        variables = {"A3PO_VLLM_TOKEN_FILE": str(root / "token"), "A3PO_VLLM_LAUNCHED": "1"}
        (root / "recipe.json").write_text(json.dumps({"arguments": [], "environment": variables}))
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, name: str, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "a3po_vllm.registered", "recipe.json", "servers", name, *options]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": f"{PLUGIN}:{self.root}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def url(self, name: str, other_than: str = "") -> str:
        """The one registered there, once there is another."""
        file = self.folder / f"{name}.url"
        wait_until(lambda: file.is_file() and file.read_text().split("\n")[0] != other_than)
        return file.read_text().split("\n")[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def server_of(registered: "subprocess.Popen[str]") -> int:
    """The process id of the server itself."""
    children = Path(f"/proc/{registered.pid}/task/{registered.pid}/children")
    wait_until(lambda: bool(children.read_text().split()))
    return int(children.read_text().split()[0])


def is_alive(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 401
    except ConnectionError:
        return False
    finally:
        connection.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    for process in site.processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_it_registers_serves_comes_back_and_ends(site: Site) -> None:
    registered = site.start("a", "--", "--seed", "1")
    first = site.url("a")
    assert is_alive(first)
    assert f"attempt 1, node {os.uname().nodename}" in (site.folder / "a.url").read_text()

    os.kill(server_of(registered), signal.SIGKILL)
    second = site.url("a", other_than=first)
    assert is_alive(second)

    (site.folder / "a.failed").touch()
    third = site.url("a", other_than=second)
    assert is_alive(third)
    assert not is_alive(second)
    assert not (site.folder / "a.failed").exists()

    (site.root / "sick").touch()  # it lives, but answers its health check with an error
    wait_until(lambda: not (site.folder / "a.url").exists())
    (site.root / "sick").unlink()
    fourth = site.url("a", other_than=third)

    registered.send_signal(signal.SIGUSR1)
    output, _ = registered.communicate()
    assert registered.returncode == 0
    assert "ended, as it was asked to" in output
    assert not (site.folder / "a.url").exists()
    assert not is_alive(fourth)


def test_a_later_attempt_fences_the_one_before_off(site: Site) -> None:
    old = site.start("a", "--attempt", "1")
    before = site.url("a")
    site.start("a", "--attempt", "2")
    after = site.url("a", other_than=before)
    output, _ = old.communicate()
    assert old.returncode == 3
    assert "attempt 1 of a is fenced off" in output
    assert not is_alive(before)
    assert site.url("a") == after
    assert is_alive(after)
    late = site.start("a", "--attempt", "1")
    assert late.wait() == 3
    assert site.url("a") == after


def test_it_ends_with_the_run_and_gives_up_for_a_person(site: Site) -> None:
    (site.root / "recipe.json").rename(site.root / "later")
    waiting = site.start("waits", "--until", "summary.json")
    ended = site.start("is-stopped-early")
    wait_until(lambda: catches_signals(ended))
    ended.send_signal(signal.SIGTERM)
    assert ended.wait() == 0
    (site.root / "later").rename(site.root / "recipe.json")
    url = site.url("waits")
    (site.root / "summary.json").touch()
    output, _ = waiting.communicate()
    assert waiting.returncode == 0
    assert "the run is done" in output
    assert not is_alive(url)

    (site.root / "broken").touch()
    broken = site.start("broken")
    output, _ = broken.communicate()
    assert broken.returncode == 3
    assert "3 starts in a row never answered: needs a person" in output


def catches_signals(process: "subprocess.Popen[str]") -> bool:
    """Whether its handlers are there: SIGTERM is among the signals it catches."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_the_recipe_is_that_of_a_launched_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replays = Replays(tmp_path)
    token_file = tmp_path / "token"
    overrides = ["rollout.max_concurrent_samples=24"]
    assert recipe.main([str(replays.config), str(token_file), *overrides]) == 0
    found = json.loads(capsys.readouterr().out)
    arguments = dict(zip(found["arguments"], found["arguments"][1:]))
    assert arguments["--model"] == str(tmp_path / "model")
    assert arguments["--max-num-seqs"] == "24"
    assert "--host" not in arguments
    assert found["environment"]["A3PO_VLLM_TOKEN_FILE"] == str(token_file)
