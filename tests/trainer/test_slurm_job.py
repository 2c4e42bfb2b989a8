"""A Slurm job in words; on a real Slurm in tests/slurm/test_jobs.py."""

from pathlib import Path

import pytest

from megatron_a3po.environment import read_launch
from megatron_a3po.errors import InputError
from megatron_a3po.trainer.slurm_job import describe, describe_job, rows

OPERATORS_PAGE = Path(__file__).parent.parent.parent / "slurm" / "README.md"

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "a3po",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.fixture(autouse=True)
def no_slurm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside a container: variables, but no commands."""
    monkeypatch.setenv("PATH", "")


def test_what_a_task_sees() -> None:
    found = dict(rows(TASK, read_launch(TASK)))
    assert found["job"].startswith("7 (a3po), unknown")
    assert found["attempt"] == "3"
    assert found["tasks"] == "4, of which this is 2: train takes each as one rank"
    assert found["rendezvous"] == "n0:20052"  # 20000 + 7 * 7 + 3
    assert "8" in found["CPUs, GPUs of the node"]


def test_what_a_batch_shell_sees() -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert "train starts its ranks itself" in dict(rows(shell, read_launch(shell)))["tasks"]


def test_a_heterogeneous_job_has_nodes_of_each_kind() -> None:
    groups = {"SLURM_HET_SIZE": "2"}
    for number, (count, nodes) in enumerate([("2", "n[0-1]"), ("8", "m[0-7]")]):
        groups |= {
            f"SLURM_JOB_NUM_NODES_HET_GROUP_{number}": count,
            f"SLURM_JOB_NODELIST_HET_GROUP_{number}": nodes,
        }
    found = dict(rows(TASK | groups, read_launch(TASK)))
    assert found["nodes"] == "2: n[0-1], and 8: m[0-7]"


def test_no_job_is_said() -> None:
    with pytest.raises(InputError, match="SLURM_JOB_ID is not set"):
        rows({}, read_launch({}))
    with pytest.raises(InputError, match="--slurm 8: Slurm does not know"):
        describe_job("8")


# Of a job that is over (`man sacct`, JOB STATE CODES; the last two are Slurm's from 24.05).
TERMINAL = [
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", "LAUNCH_FAILED", "RECONFIG_FAIL"),
]


@pytest.mark.parametrize("state", TERMINAL)
def test_every_terminal_state_has_words_of_its_own(state: str) -> None:
    words = describe({"JobState": state})
    assert words.startswith(f"{state}: ")
    assert "see the manual" not in words
    others = [describe({"JobState": other}).partition(": ")[2] for other in TERMINAL if other != state]
    assert words.partition(": ")[2] not in others
    assert state in OPERATORS_PAGE.read_text(), "the operator's page does not say what to do"


ARRAY = """JobId=8 ArrayJobId=7 ArrayTaskId=2-3 JobName=pool JobState=PENDING Restarts=0 StdOut=/log/2
JobId=9 ArrayJobId=7 ArrayTaskId=1 JobName=pool JobState=RUNNING Restarts=1 NodeList=n1 StdOut=/log/1
"""
HETEROGENEOUS = """JobId=7 HetJobId=7 HetJobOffset=0 JobName=a3po JobState=RUNNING NodeList=n[0-1] StdOut=/log/0
JobId=8 HetJobId=7 HetJobOffset=1 JobName=a3po JobState=COMPLETING NodeList=n2 StdOut=/log/1
"""


@pytest.mark.parametrize(("told", "jobs"), [(ARRAY, ["7_2-3", "7_1"]), (HETEROGENEOUS, ["7+0", "7+1"])])
def test_every_part_of_a_job_is_told(
    told: str, jobs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "told").write_text(told)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\nexec /bin/cat "{tmp_path}/told"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = describe_job("7")
    assert [text.partition(" ")[0] for name, text in found if name == "job"] == jobs
    states = [line.split("JobState=")[1].split()[0] for line in told.splitlines()]
    assert [text.partition(":")[0] for name, text in found if name == "state"] == states


def test_a_failed_job_is_told_by_its_exit_code() -> None:
    words = {code: describe({"JobState": "FAILED", "ExitCode": f"{code}:0"}) for code in (1, 2, 3, 75, 130)}
    assert len(set(words.values())) == len(words)
    assert "submit it again to continue" in words[75]
    assert words[3].endswith("(exit code 3)")
