"""The GPU check where there is no GPU: it says so in one sentence; its parts can be tried on the CPU; its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_a3po.environment import child_environment

ROOT = Path(__file__).parents[2]


def run_tool(*arguments: str, seconds: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = child_environment(PYTHONPATH=".", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path):
    done = run_tool("tools/gpu_check.py", "--output", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpu-check left out: ")
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_an_unknown_part_is_refused():
    done = run_tool("tools/gpu_check.py", "loss_timings")
    assert done.returncode == 2
    assert "no such part: loss_timings; there are environment, loss_agreement" in done.stderr


@pytest.mark.parametrize("part", ["environment", "loss_agreement", "local_engine"])
def test_a_part_passes_on_the_cpu(part: str, tmp_path: Path):
    done = run_tool("tools/gpu_parts.py", part, "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (done.returncode, found["status"], found["notes"]) == (0, "passed", []), done.stdout
    assert found["rows"]


@pytest.mark.slow
def test_the_actor_in_bf16_follows_fp32(tmp_path: Path):
    done = run_tool("tools/gpu_parts.py", "actor_local", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (done.returncode, found["status"], found["notes"]) == (0, "passed", []), done.stdout


def test_what_cannot_run_is_left_out_with_the_reason(tmp_path: Path):
    done = run_tool("tools/gpu_parts.py", "loss_timing", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["status"], found["notes"]) == ("left out", ["no GPU"])


REPORT_OF_THREE = """
import sys
sys.path.insert(0, "tools")
from gpu_check import report
found = [("environment", "passed", []), ("loss_timing", "left out", ["no GPU"]), ("quickstart", "failed", ["a | b"])]
rows = [{"what": "error", "found": 1.23456e-7}, {"what": "device", "bound": None}]
print(report("GPU", [
    {"part": part, "status": status, "notes": notes, "rows": rows if status == "passed" else [], "seconds": 1.0}
    for part, status, notes in found
]))
"""


def test_the_report_begins_with_what_did_not_pass():
    lines = run_tool("-c", REPORT_OF_THREE).stdout.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert table[1] == "| loss_timing | !!! LEFT OUT | 1.0 | no GPU |"
    assert table[2] == "| quickstart | !!! FAILED | 1.0 | a / b |"
    assert table[3] == "| environment | ok | 1.0 |  |"
    assert table[-2:] == ["| error | 1.235e-07 |  |", "| device |  |  |"]
