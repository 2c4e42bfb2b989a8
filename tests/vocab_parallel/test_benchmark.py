"""The benchmark runs, on one shard and two, and writes rows that programs can read."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_writes_its_rows(tmp_path: Path):
    cases = ("32,16,128,1,0.5", "32,16,128,2,1.0")
    command = [
        sys.executable,
        "tools/benchmark_loss.py",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    command += ["--cases", *cases]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "worst ratio of this layer" in done.stdout
    assert "total work of the ranks" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len({row["case"] for row in rows}) == len(cases)
    measured = [row for row in rows if "left_out" not in row]
    assert {"case", "implementation", "seconds", "ratio", "peak_mb"} <= set.intersection(*map(set, measured))
    assert {row["ratio"] for row in measured if row["implementation"] == "three products"} == {1.0}
