"""A Slurm job in words; on a real Slurm in tests/slurm/test_jobs.py."""

import pytest

from megatron_a3po.environment import read_launch
from megatron_a3po.errors import InputError
from megatron_a3po.trainer.slurm_job import STATES, describe, describe_job, rows

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


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_words(state: str) -> None:
    assert describe({"JobState": state}) == f"{state}: {STATES[state]}"


def test_a_failed_job_is_told_by_its_exit_code() -> None:
    words = {code: describe({"JobState": "FAILED", "ExitCode": f"{code}:0"}) for code in (1, 2, 3, 75, 130)}
    assert len(set(words.values())) == len(words)
    assert "submit it again to continue" in words[75]
    assert words[3].endswith("(exit code 3)")
