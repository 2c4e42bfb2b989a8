"""The summary of a run and its closing words, from rows worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.errors import InputError
from megatron_a3po.trainer.summary import closing_lines, duration, read_summary, summarize, write_summary
from tests.trainer.runs import record_steps


def summary_of(run_dir: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "status": "done",
        "accuracy_before": 0.431,
        "accuracy_after": 0.912,
        "export": run_dir / "export",
        "wall_seconds": 20.0,
        "multi_version_fraction": 0.41,
    }
    return summarize(run_dir, **{**found, **changes})


def test_counts_every_step_once(tmp_path: Path):
    record_steps(tmp_path, range(1, 4))
    record_steps(tmp_path, range(3, 5), attempt=2, forwards_per_token=1.5)
    record_steps(tmp_path / "warm_start", range(1, 3))
    assert summary_of(tmp_path) == {
        "status": "done",
        "steps": 4,
        "wall_seconds": 20.0,
        "accuracy_before": 0.431,
        "accuracy_after": 0.912,
        "export": str(tmp_path / "export"),
        "forwards_per_token": 1.25,
        "multi_version_fraction": 0.41,
        "seconds": {"warm_start": 4.0, "step": 8.0, "forward_backward": 4.0, "wait_for_samples": 2.0},
    }


def test_written_whole(tmp_path: Path):
    record_steps(tmp_path, range(1, 3), loss=float("nan"))
    summary = summary_of(tmp_path, accuracy_after=float("nan"))
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert json.loads((tmp_path / "summary.json").read_text())["accuracy_after"] is None
    assert not list(tmp_path.glob("*.tmp"))


def test_without_a_summary(tmp_path: Path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_closing_lines(tmp_path: Path):
    record_steps(tmp_path, range(1, 5))
    record_steps(tmp_path / "warm_start", range(1, 3))
    lines = closing_lines(summary_of(tmp_path))
    assert lines[0] == "done: 4 training steps in 20.0 s"
    assert "0.431 before, 0.912 after (+0.481)" in "\n".join(lines)
    times = [line.removeprefix("time").split() for line in lines if line.endswith("%")]
    assert times == [
        ["warm", "start", "4.0", "s", "20%"],
        ["forward", "backward", "4.0", "s", "20%"],
        ["wait", "for", "samples", "2.0", "s", "10%"],
        ["rest", "of", "the", "steps", "2.0", "s", "10%"],
        ["outside", "of", "steps", "8.0", "s", "40%"],
    ]
    assert f'from_pretrained("{tmp_path / "export"}")' in lines[-1]


def test_closing_lines_of_a_run_that_did_nothing(tmp_path: Path):
    nothing = {
        "accuracy_before": None,
        "accuracy_after": None,
        "export": None,
        "multi_version_fraction": None,
    }
    assert closing_lines(summary_of(tmp_path, status="stopped", wall_seconds=0.0, **nothing)) == [
        "stopped: 0 training steps in 0.0 s"
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.25, "8.2 s"),
        (59.97, "1 min 00 s"),
        (245.4, "4 min 05 s"),
        (7380, "2 h 03 min"),
        (3599.8, "1 h 00 min"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
