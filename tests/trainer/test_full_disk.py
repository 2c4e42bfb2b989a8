"""Whole runs on a file system that is full for a while, or for good: what goes on, what waits, what is said.

A checkpoint alone on a full disk: test_saving.py.
"""

import json
import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_a3po.trainer.json_lines import JsonLines, read_rows
from megatron_a3po.trainer.recording import read_metrics
from tests.trainer.task import Task
from tests.trainer.test_saving import small_disk

FULL_AFTER = 2  # updates


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    with small_disk(tmp_path / "disk") as mounted:
        yield tmp_path / "disk", mounted


def fill(ballast: Path) -> None:
    """To the last byte: what is already there may still grow to the end of its page."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def full_between(disk: Path, mounted: bool, *, room_after: int) -> Callable[[], None]:
    """In the fork of a run: from one update to another nothing more can be written there."""

    def before() -> None:
        from megatron_a3po.trainer import loop

        train_step, ballast, limits = (
            loop.train_step,
            disk / "ballast",
            resource.getrlimit(resource.RLIMIT_FSIZE),
        )
        done = iter(range(1, 100))

        def and_then(*arguments):
            metrics = train_step(*arguments)
            number = next(done)
            if number == FULL_AFTER:
                fill(ballast) if mounted else resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limits[1]))
            if number == room_after:
                ballast.unlink() if mounted else resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            return metrics

        loop.train_step = and_then

    return before


def test_a_run_goes_on_while_the_disk_is_full(disk: tuple[Path, bool], tmp_path: Path) -> None:
    """No weights, rows, batches or checkpoints get there in two steps; afterwards nothing lacks but two batches."""
    folder, mounted = disk
    task, run_dir = Task(tmp_path), folder / "run"
    keys = [f"run_dir={run_dir}", "trainer.steps=6", "trainer.save_every=1", "trainer.sample_every=1"]
    before = full_between(folder, mounted, room_after=4)
    ended = task.start("run", *keys, "rollout.max_staleness=3", "trainer.trace=[2,3]", before=before).wait()
    assert ended.code == 0, ended.output
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (run_dir / "metrics.jsonl").read_text().count("\n") == 6, "none was torn"
    assert {row["step"] for row in read_rows(run_dir / "samples.jsonl")} == {1, 2, 3, 4, 5, 6}
    assert max(row["staleness/max"] for row in rows) <= 3
    for step in (2, 3):
        assert f"the weights of version {step} are not published" in ended.output
        assert f"no checkpoint of step {step}" in ended.output
    assert ended.output.count("metrics.jsonl cannot be written") == 1
    assert ended.output.count("The run goes on with samples of version 1,") == 2
    assert ended.output.count("this batch is not kept") == 2
    assert "Traceback" not in ended.output
    assert "Logging error" not in ended.output
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-5", "step-6"]
    assert not list(run_dir.rglob("*.tmp"))
    assert sorted(path.name for path in (run_dir / "batches").iterdir()) == [
        f"step-{step:06d}.npz" for step in (1, 4, 5, 6)
    ]


def test_a_disk_that_stays_full_ends_the_run_in_words(disk: tuple[Path, bool], tmp_path: Path) -> None:
    """And once there is room, the run goes on, but for other prompts."""
    folder, mounted = disk
    task, run_dir = Task(tmp_path), folder / "run"
    keys = [f"run_dir={run_dir}", "trainer.steps=5", "trainer.save_every=1", "rollout.max_staleness=1"]
    ended = task.start("run", *keys, before=full_between(folder, mounted, room_after=0)).wait()
    assert ended.code == 3, ended.output
    said = " ".join(ended.output.split())
    assert "the weights of version 3 are not published" in said
    assert "Engines have version 1, and rollout.max_staleness=1 needs newer ones" in said
    assert "no checkpoint of step 3 either" in said
    assert "Traceback" not in said
    (folder / "ballast").unlink(missing_ok=True)
    train = tmp_path / "train.jsonl"
    rows_there = train.read_text()
    train.write_text(rows_there + '{"prompt": "9+9=", "answer": "18"}\n')
    ended = task.start("run", *keys).wait()
    assert ended.code == 2, ended.output
    assert f"step-1 was written with another content of data.train={train} (73 rows, now 74" in ended.output
    train.write_text(rows_there)
    ended = task.start("run", *keys).wait()
    assert ended.code == 0, ended.output
    rows = read_metrics(run_dir)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2)]


def test_a_row_is_written_whole_or_waits(disk: tuple[Path, bool], caplog: pytest.LogCaptureFixture) -> None:
    folder, mounted = disk
    if not mounted:
        pytest.skip("no file system can be mounted here")
    caplog.set_level(logging.ERROR)
    rows = [{"step": step, "text": "x" * 700} for step in range(9)]
    file, ballast = JsonLines(folder / "rows.jsonl"), folder / "ballast"
    for row in rows[:3]:
        file.append(row)
    fill(ballast)
    for row in rows[3:7]:  # more than the rest of a page
        file.append(row)
    content = (folder / "rows.jsonl").read_bytes()
    assert content.endswith(b"\n")
    there = [json.loads(line)["step"] for line in content.splitlines()]
    assert there == list(range(len(there)))
    assert 3 <= len(there) < 7
    late = JsonLines(folder / "new" / "rows.jsonl")
    late.append(rows[0])
    ballast.unlink()
    late.close()
    file.append(rows[7])
    fill(ballast)
    for row in rows * 3:
        file.append(row)
    file.close()
    assert list(read_rows(folder / "rows.jsonl"))[:8] == rows[:8]
    assert list(read_rows(folder / "new" / "rows.jsonl")) == rows[:1]
    assert caplog.text.count("new/rows.jsonl cannot be written (No space left on device)") == 1
    assert caplog.text.count("disk/rows.jsonl cannot be written (No space left on device)") == 2
    assert "rows of" in caplog.text
