"""The timeline of a real run: both ranks, the rollout process and its engine on one clock, and the overlap in it. The
same run is mirrored to Weights & Biases and says how much memory it took.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.rollout.engines.local import Step, bursts
from megatron_a3po.rollout.spans import Span, name_of
from megatron_a3po.trainer.recording import read_metrics
from megatron_a3po.trainer.report.page import page
from megatron_a3po.trainer.report.past import read_past
from megatron_a3po.trainer.trace import lanes, trace_of
from tests.trainer.task import Task
from tests.trainer.wandb_files import history, needs_wandb

FIRST, LAST = 3, 8
Event = dict[str, Any]


def has_wandb() -> bool:
    try:
        return bool(version("wandb"))
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = Task(tmp_path_factory.mktemp("traced"))
    task.run(
        "run",
        f"trainer.trace=[{FIRST}, {LAST}]",
        f"trainer.steps={LAST + 1}",
        "rollout.max_staleness=2",
        "actor.tensor_model_parallel_size=2",
        *(["trainer.wandb={project: sums, mode: offline}"] if has_wandb() else []),
    )
    return task.folder / "run"


@pytest.fixture(scope="module")
def tracks(run_dir: Path) -> dict[tuple[str, str], list[Event]]:
    """The events of (process, track), by their beginning."""
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    found: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for e in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        found[names["process_name", e["pid"], 0], names["thread_name", e["pid"], e["tid"]]].append(e)
    return dict(sorted(found.items()))


def ranks(tracks: dict[tuple[str, str], list[Event]]) -> list[list[Event]]:
    return [events for (process, _), events in tracks.items() if process == "trainer"]


def touch(one: Event, other: Event) -> bool:
    return one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"]


def within(inner: Event, outer: Event, slack: float = 1.0) -> bool:
    begins = outer["ts"] - slack <= inner["ts"]
    return begins and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack


def test_every_rank_has_its_steps_and_their_parts(tracks) -> None:
    assert [track for process, track in tracks if process == "trainer"] == [
        f"rank {rank} (tp {rank}, pp 0, dp 0)" for rank in range(2)
    ]
    for events in ranks(tracks):
        steps = [e for e in events if e["name"].startswith("step ")]
        assert [e["name"] for e in steps] == [f"step {step}" for step in range(FIRST, LAST + 1)]
        assert not any(touch(one, next_one) for one, next_one in pairwise(steps) if one["dur"] > 2)
        parts = [e for e in events if not e["name"].startswith("step ")]
        assert {"wait for samples", "forward backward", "optimizer", "publish"} <= {e["name"] for e in parts}
        assert all(any(within(part, step) for step in steps) for part in parts)


def test_one_clock(tracks) -> None:
    """No rank takes a step long before the other, and no weights are sampled with before the trainer published them."""
    one, other = ({e["name"]: e for e in events if e["name"].startswith("step ")} for events in ranks(tracks))
    assert all(touch(one[name], other[name]) for name in one)
    published = {
        int(step["name"].split()[1]): e["ts"]
        for step in one.values()
        for e in ranks(tracks)[0]
        if e["name"] == "publish" and within(e, step)
    }
    assert sorted(published) == list(range(FIRST, LAST + 1))
    sampled = tracks["local engine", "decoding"]
    taken = tracks["local engine", "new weights"]
    told = [e for (_, track), events in tracks.items() if track == "new weights" for e in events]
    for e in (*sampled, *taken, *told):
        if (made := int(e["name"].split()[1])) in published:
            assert e["ts"] >= published[made]
    assert {int(e["name"].split()[1]) for e in sampled} & published.keys()


def test_the_overlap_is_seen(tracks, run_dir: Path) -> None:
    """As the metric has it: in a step that saw tokens sampled meanwhile, generation and training touch."""
    trained = [e for e in ranks(tracks)[0] if e["name"] == "forward backward"]
    steps = {e["name"]: e for e in ranks(tracks)[0] if e["name"].startswith("step ")}
    overlapping = 0
    for row in read_metrics(run_dir):
        if (step := steps.get(f"step {row['step']}")) and row["rollout/sampled_while_training"] > 0:
            overlapping += 1
            updates = [e for e in trained if within(e, step)]
            assert any(touch(e, update) for e in tracks["local engine", "decoding"] for update in updates)
    assert overlapping > 0


def test_groups_are_on_it_with_their_versions(tracks) -> None:
    groups = [e for (_, track), events in tracks.items() if track == "generate a group" for e in events]
    assert groups
    assert all(e["name"].startswith("prompt ") and "version" in e["args"]["tokens of"] for e in groups)
    assert any(track == "score a group" for _, track in tracks)


def test_memory_of_every_kind_of_process_is_measured(run_dir: Path) -> None:
    rows = read_metrics(run_dir)
    for name in ("memory/rank_bytes", "memory/rollout_bytes"):
        values = [row[name] for row in rows]
        # A peak; the kernel counts per core, and what it adds up may be some pages off.
        assert all(later > 0.99 * earlier for earlier, later in pairwise(values))
        assert 5e7 < values[0] < 5e10


def test_the_report_has_both(run_dir: Path) -> None:
    text = page([read_past(run_dir)])
    assert f"<dt>Timeline</dt><dd>{run_dir}/trace.json" in text
    assert re.search(r"at most [\d.]+ GiB a rank, [\d.]+ GiB the rollout process", text)
    assert '"title":"Memory"' in text


def test_weights_and_biases_has_the_run(run_dir: Path) -> None:
    needs_wandb()
    rows = [
        {name: value for name, value in row.items() if isinstance(value, int | float)}
        for row in ({**row, "version": None, "attempt": None} for row in read_metrics(run_dir))
    ]
    assert history(run_dir) == rows


def span(start: float, end: float, track: str = "segments", process: str = "vLLM http://a") -> Span:
    return Span(process, track, f"{start:g}", start, end)


@pytest.mark.parametrize(
    ("nested", "wanted"),
    [(False, [["0", "4", "6"], ["1", "5"], ["2"]]), (True, [["0", "1", "4", "6"], ["2", "5"]])],
)
def test_spans_at_once_are_drawn_in_rows_of_their_own(nested: bool, wanted: list[list[str]]) -> None:
    spans = [span(0, 4), span(1, 3), span(2, 5), span(4, 6), span(5, 7), span(6, 8)]
    assert [[one.name for one in row] for row in lanes(spans, nested=nested)] == wanted


def test_a_server_is_a_process_and_times_begin_at_nought() -> None:
    trace = trace_of(
        [span(12, 13), span(12.5, 14), span(11, 13.5, "rank 0", "trainer"), span(12, 13, process="vLLM b")]
    )
    names: Callable[[str], list[str]] = lambda kind: [  # noqa: E731
        e["args"]["name"] for e in trace["traceEvents"] if e["name"] == kind
    ]
    assert names("process_name") == ["trainer", "vLLM b", "vLLM http://a"]
    assert names("thread_name") == ["rank 0", "segments", "segments", "segments"]
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["ts"], e["dur"]) for e in events] == [
        (1, 1, 0.0, 2.5e6),
        (2, 1, 1e6, 1e6),
        (3, 1, 1e6, 1e6),
        (3, 2, 1.5e6, 1.5e6),
    ]


def test_decoding_without_a_pause_is_one_span() -> None:
    steps = [Step(0.0, 1.0, 4, 3), Step(1.001, 2.0, 4, 3), Step(2.001, 3.0, 2, 4), Step(3.5, 4.0, 2, 4)]
    assert [(s.name, s.start, s.end, s.details["tokens"]) for s in bursts(steps)] == [
        ("version 3", 0.0, 2.0, 8),
        ("version 4", 2.001, 3.0, 2),
        ("version 4", 3.5, 4.0, 2),
    ]
    assert [name_of(v) for v in ([], [3, 3], [5, 3])] == ["nothing", "version 3", "versions 3 to 5"]
