"""The checkpoint benchmark at a toy size: it runs, and its row is what programs read. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_a3po.environment import child_environment

ROOT = Path(__file__).parents[2]
SIZES = {"hidden": 64, "layers": 2, "vocab": 64, "tokens": 32, "rounds": 2}


def test_the_row_is_of_its_rounds(tmp_path: Path):
    file = tmp_path / "row.json"
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    done = subprocess.run(
        [sys.executable, "tools/benchmark_save.py", *sizes, f"--folder={tmp_path}", f"--json={file}"],
        cwd=ROOT,
        env=child_environment(PYTHONPATH=".", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())
    assert len(row["rounds"]) == 2
    for one in row["rounds"]:
        assert 0 < one["held_up_s"] < one["complete_s"] + one["next_step_s"]
        assert one["ratio"] == pytest.approx(one["held_up_s"] / one["synchronous_s"])
        assert one["next_step_ratio"] == pytest.approx(one["next_step_s"] / one["step_s"])
        assert one["state_mb"] > 0.5
    assert row["seconds"] == row["held_up_s"]
    assert f"| {row['synchronous_s']:.3f} | {row['held_up_s']:.3f} | {row['ratio']:.3f} |" in done.stdout
    assert list(tmp_path.iterdir()) == [file]
