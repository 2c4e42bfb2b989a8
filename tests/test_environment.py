"""Who started this process, from the variables each launcher really sets."""

from pathlib import Path

import pytest

from megatron_a3po.environment import Launch, read_launch, visible_gpus
from megatron_a3po.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29501",
}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
STEP = BATCH_SHELL | {
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def test_by_itself():
    assert read_launch({}) == Launch("self")
    assert read_launch({}).world_size is None


def test_torchrun():
    assert read_launch(TORCHRUN) == Launch("torchrun", 3, 4, 1, 2, "n0", 29501)


def test_torchrun_inside_of_srun_is_torchrun():
    assert read_launch(STEP | TORCHRUN).launcher == "torchrun"


def test_srun_step():
    launched = read_launch(STEP)
    assert (launched.launcher, launched.rank, launched.world_size) == ("srun", 3, 5)
    assert (launched.local_rank, launched.local_world_size) == (1, 2)
    assert launched.master_address == "gpu07"
    assert read_launch(STEP | {"SLURM_NODEID": "2"}).local_world_size == 1


@pytest.mark.parametrize(
    "variables",
    [
        BATCH_SHELL,
        BATCH_SHELL | {"SLURM_STEP_ID": "4294967291"},
        BATCH_SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
    ],
    ids=["sbatch", "sbatch with a step id", "salloc", "one task", "no task"],
)
def test_slurm_without_several_tasks_is_by_itself(variables: dict[str, str]):
    assert read_launch(variables).launcher == "self"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("n3,n1", "n3"),
        ("gpu[07-09,11]", "gpu07"),
        ("gpu[7,9],login1", "gpu7"),
        ("rack1-gpu[01-02]-ib", "rack1-gpu01-ib"),
    ],
)
def test_master_is_the_first_node(nodes: str, first: str):
    assert read_launch(STEP | {"SLURM_STEP_NODELIST": nodes}).master_address == first
    assert (
        read_launch(STEP | {"SLURM_STEP_NODELIST": nodes, "MASTER_ADDR": "10.0.0.1"}).master_address
        == "10.0.0.1"
    )


def test_every_task_finds_the_same_port_and_other_jobs_another():
    ports = {read_launch(STEP | {"SLURM_PROCID": str(rank)}).master_port for rank in range(5)}
    assert len(ports) == 1
    assert read_launch(STEP | {"SLURM_JOB_ID": "8"}).master_port not in ports
    assert read_launch(STEP | {"SLURM_STEP_ID": "1"}).master_port not in ports
    assert read_launch(STEP | {"MASTER_PORT": "1234"}).master_port == 1234


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_a_broken_environment_is_named(variables: dict[str, str], name: str):
    with pytest.raises(ConfigError, match=name):
        read_launch(variables)


def test_the_gpus_of_a_machine(tmp_path: Path):
    for bus in ("0000:1b:00.0", "0000:43:00.0", "0000:52:00.0"):
        (tmp_path / bus).mkdir()
    assert visible_gpus({}, tmp_path) == ["0", "1", "2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "5,7"}, tmp_path) == ["5", "7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert visible_gpus({}, tmp_path / "no driver") == []
