"""The step benchmark at a toy size: it runs, and its rows are what programs read. No time is asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_a3po.environment import child_environment

ROOT = Path(__file__).parents[2]
SIZES = {"hidden": 16, "layers": 2, "ffn": 24, "vocab": 19, "prompts": 4, "samples": 2, "prompt-tokens": 4}
SIZES |= {"response-tokens": 6, "tokens": 32, "rounds": 2, "warm-up": 0}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
STEPS = ["loglinear", "recompute", "forced recompute"]
DENSE = "loglinear, dense logits"


@pytest.mark.parametrize("layout", [(), ("--tp", "2", "--pp", "2")], ids=["one rank", "TP 2 x PP 2"])
def test_every_case_has_its_rows(layout: tuple[str, ...], tmp_path: Path):
    command = [
        sys.executable,
        "tools/benchmark_step.py",
        *TINY,
        "--mini-batches",
        "1",
        "2",
        *layout,
        "--json",
        str(tmp_path / "rows.json"),
    ]
    environment = child_environment(PYTHONPATH=".", OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the loop's overhead" in done.stdout
    for said in ("the proximal policy of loglinear takes", "1 forward predicts"):
        assert done.stdout.count(said) == 2, done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    for case, passes in (("1 mini-batch", [1, 1, 2]), ("2 mini-batches", [1, 1.5, 2])):
        found = {row["implementation"]: row for row in rows if row["case"] == case}
        assert list(found) == [*STEPS, DENSE, "one forward", "proximal policy"]
        assert found["proximal policy"]["seconds"] < found["one forward"]["seconds"]
        assert found[DENSE]["forwards_per_token"] == 1
        assert found["loglinear"]["ratio"] == 1
        measured = [found[step]["forwards_per_token"] for step in STEPS]
        assert measured == pytest.approx(passes, abs=0.25)
        overhead = [row["implementation"] for row in rows if row["case"] == f"{case}, the loop's overhead"]
        assert overhead == ["bare", "step (loglinear)"]
    memory = {row["implementation"]: row for row in rows if "longest_sequence" in row}
    assert list(memory) == ["loglinear", DENSE]
    for row in memory.values():
        assert row["case"] == "1 mini-batch"
        assert row["lengths"] == [16, 32]
        low, high = row["last_stage_mb"]
        assert high > low > 0
        rest = 8 * 2**10 - row["last_stage_held_mb"] - high
        assert row["longest_sequence"] == pytest.approx(32 + rest * 16 / (high - low), abs=1)
    for row in rows:
        assert row["seconds"] > 0
        assert math.isfinite(row["ratio"])
        assert row["forward_backward_s"] + row["proximal_pass_s"] > 0
        assert row["peak_mb"] == max(row["peak_mb_by_stage"])
        assert len(row["peak_mb_by_stage"]) == (2 if layout else 1)
