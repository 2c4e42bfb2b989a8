"""What is written can be read by anybody, whatever was not a number and whenever the writer was killed."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_a3po.trainer.recording import Recorder, read_metrics
from tests.trainer.runs import record_steps


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str):
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_row_is_strict_json(tmp_path: Path):
    recorder = Recorder(tmp_path, attempt=2)
    values = {
        "loss": float("nan"),
        "grad_norm": np.float32("inf"),
        "entropy": torch.tensor(0.5),
        "count": np.int64(3),
        "staleness/histogram": {0: np.int64(12), 1: 30},
    }
    recorder.record(4, 3, values)
    (row,) = lines_of(tmp_path / "metrics.jsonl")  # there before close()
    recorder.close()
    assert row == {
        "step": 4,
        "version": 3,
        "attempt": 2,
        "loss": None,
        "grad_norm": None,
        "entropy": 0.5,
        "count": 3,
        "staleness/histogram": {"0": 12, "1": 30},
    }
    assert list(row)[:3] == ["step", "version", "attempt"]


def test_the_last_row_of_a_step_counts(tmp_path: Path):
    record_steps(tmp_path, range(1, 6))
    record_steps(tmp_path, range(4, 8), attempt=2)
    attempts = {row["step"]: row["attempt"] for row in read_metrics(tmp_path)}
    assert list(attempts.items()) == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2)]


def test_a_torn_last_line_is_passed_over_and_cut_off_by_the_next_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    record_steps(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    record_steps(tmp_path, range(3, 5), attempt=2)
    assert [row["step"] for row in lines_of(file)] == [1, 2, 3, 4]
    assert not caplog.records


def test_a_damaged_line_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    record_steps(tmp_path, range(1, 3))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\0\0\n" + file.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert f"{file}:1" in caplog.text


def test_nothing_recorded(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_numbers_and_a_resumed_run_replaces_its_own(tmp_path: Path):
    record_steps(tmp_path, range(1, 6))
    record_steps(tmp_path, range(4, 7), attempt=2, loss=float("nan"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert "reward/avg" in names
    assert not {"staleness/histogram", "step", "attempt"} & set(names)
    assert [event.step for event in events.Scalars("reward/avg")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]  # null is no number


def test_a_run_goes_on_without_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    record_steps(tmp_path, range(1, 4))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    (record,) = caplog.records
    assert "no more TensorBoard from step 1 on" in record.getMessage()


def test_reading_needs_no_torch():
    code = "import megatron_a3po.trainer.commands.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
