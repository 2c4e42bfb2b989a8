"""What the quickstart learns, it learns from the advantages: without them its accuracy stays where it was."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.trainer import batch
from tests.trainer.command import ROOT, fork, spawn

CONFIG = str(ROOT / "examples/quickstart/config.yaml")


@pytest.mark.slow
def test_the_quickstart_without_advantages_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_advantages() -> None:
        batch.group_advantages = lambda rewards, estimator: np.zeros_like(rewards)

    monkeypatch.chdir(ROOT)
    prepared = spawn(tmp_path / "prepare", program=("examples/quickstart/prepare.py",)).wait()
    assert prepared.code == 0, prepared.output
    run_dir = tmp_path / "run"
    command = fork(tmp_path, "train", CONFIG, f"run_dir={run_dir}", before=without_advantages)
    ended = command.wait(timeout_s=900)
    assert ended.code == 0, ended.output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert 0.2 < summary["accuracy_before"] < 0.6
    assert abs(summary["accuracy_after"] - summary["accuracy_before"]) <= 0.05
