"""The Weights & Biases mirror with the real package: offline, in two attempts, and with a server that never answers."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_a3po.trainer.mirror import Mirror
from megatron_a3po.trainer.recording import read_metrics
from tests.trainer.runs import record_steps
from tests.trainer.wandb_files import history, needs_wandb

PATIENCE_S = 300.0  # of a machine that is busy with other tests


@pytest.fixture(autouse=True)
def with_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_wandb()
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def run_in(run_dir: Path, mode: str) -> Path:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(
        f"trainer: {{steps: 9, wandb: {{project: sums, entity: null, mode: {mode}}}}}\n"
    )
    return run_dir


def curves(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl as W&B is to have them."""
    return [
        {name: value for name, value in row.items() if isinstance(value, int | float)}
        for row in ({**row, "version": None, "attempt": None} for row in read_metrics(run_dir))
    ]


def test_offline_the_latest_file_has_every_number_of_all_attempts(tmp_path: Path) -> None:
    run_dir = run_in(tmp_path / "run", "offline")
    record_steps(run_dir / "warm_start", range(1, 3))
    for steps in (range(1, 4), range(4, 6)):
        mirror = Mirror(run_dir, PATIENCE_S)
        record_steps(run_dir, steps, loss=float("nan") if steps[0] == 4 else 0.5)
        mirror.close()
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2
    rows = history(run_dir)
    warm = [row for row in rows if "warm_start/step" in row]
    assert [row["warm_start/step"] for row in warm] == [1, 2]
    assert "warm_start/loss" in warm[0]
    assert [row for row in rows if "step" in row] == curves(run_dir)
    assert {"loss" in row for row in rows if row.get("step", 0) >= 4} == {False}


def test_a_run_that_is_over_is_mirrored_by_the_command(tmp_path: Path) -> None:
    run_dir = run_in(tmp_path / "run", "offline")
    record_steps(run_dir, range(1, 3))
    command = [sys.executable, "-m", "megatron_a3po.trainer.wandb_mirror", str(run_dir)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert history(run_dir) == curves(run_dir)
    (run_dir / "config.yaml").write_text("trainer: {wandb: null}\n")
    ended = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "has no section trainer.wandb" in ended.stderr


def test_a_server_that_never_answers_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = run_in(tmp_path / "run", "online")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        mirror = Mirror(run_dir, PATIENCE_S)
        record_steps(run_dir, range(1, 5))  # which talks to nobody
        assert len(read_metrics(run_dir)) == 4
        mirror.close()
    (record,) = caplog.records
    assert "Weights & Biases cannot be had" in record.getMessage()
    assert "wandb sync" in record.getMessage()
    assert history(run_dir) == curves(run_dir)


def test_what_breaks_is_said_once_with_the_way_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = run_in(tmp_path / "run", "offline")
    (run_dir / "wandb").write_text("a file where a folder should be")
    Mirror(run_dir, PATIENCE_S).close()
    (record,) = caplog.records
    assert f"python -m megatron_a3po.trainer.wandb_mirror {run_dir}" in record.getMessage()
