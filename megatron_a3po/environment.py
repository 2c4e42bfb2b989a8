"""The process environment, read in this file only: who started this process, and as which rank.

Three ways to start the ranks: torchrun and srun start every one and say so in variables; otherwise the command starts
its own on this machine. In an sbatch or salloc shell Slurm's variables are set too although one process runs, so
srun counts only inside a step with several tasks. No torch here; the process groups are made in `actor/grid.py`.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_a3po.errors import ConfigError

# Slurm numbers real steps from 0 up; what is above this are its names for the batch and interactive shells.
LAST_REAL_STEP = 0xFFFFFFF0
LOCALHOST = "127.0.0.1"
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Launch:
    """Who started this process. Self-launched, `world_size` is None: the configuration decides it."""

    launcher: Literal["self", "torchrun", "srun"]
    rank: int = 0
    world_size: int | None = None
    local_rank: int = 0
    local_world_size: int | None = None
    master_address: str = LOCALHOST
    master_port: int | None = None


def read_launch(variables: Mapping[str, str] | None = None) -> Launch:
    """The launch that `variables` (default: this process's environment) describe; ConfigError if they are broken."""
    variables = os.environ if variables is None else variables
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return _torchrun(variables)
    if _in_srun_step(variables):
        return _srun(variables)
    return Launch("self")


def slurm_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What Slurm tells this process about its job, by name."""
    variables = os.environ if variables is None else variables
    return {name: text for name, text in variables.items() if name.startswith("SLURM")}


def node_name() -> str:
    """This node by the name Slurm has for it, elsewhere the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def visible_gpus(variables: Mapping[str, str] | None = None, gpus: Path = NVIDIA_GPUS) -> list[str]:
    """What CUDA calls the GPUs of this machine that processes started here may use; empty where there is none."""
    variables = os.environ if variables is None else variables
    number = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    named = variables.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(number)] if named is None else named.split(",") if named else []


def kill_order() -> str | None:
    """The kill point at which a test of recovery wants this process dead, see `lifetime.kill_point`."""
    return os.environ.get("A3PO_KILL_AT")


def child_environment(**changes: str) -> dict[str, str]:
    """A copy of the environment with `changes`, for a process this one starts."""
    return {**os.environ, **changes}


def set_default(variable: str, value: str) -> None:
    """Set a variable a library reads, unless the user has."""
    os.environ.setdefault(variable, value)


def _torchrun(variables: Mapping[str, str]) -> Launch:
    rank, world_size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"RANK is {rank}, but must be between 0 and WORLD_SIZE={world_size}: start with torchrun."
        )
    return Launch(
        "torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=_number(variables, "LOCAL_RANK", default=rank),
        local_world_size=_number(variables, "LOCAL_WORLD_SIZE", default=world_size),
        master_address=variables.get("MASTER_ADDR", LOCALHOST),
        master_port=_number(variables, "MASTER_PORT", default=29500),
    )


def _in_srun_step(variables: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in variables or "SLURM_STEP_ID" not in variables:
        return False
    return _number(variables, "SLURM_STEP_ID") < LAST_REAL_STEP and _num_tasks(variables) > 1


def _num_tasks(variables: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    return _number(variables, name, default=1)


def _srun(variables: Mapping[str, str]) -> Launch:
    world_size = _num_tasks(variables)
    job, step = _number(variables, "SLURM_JOB_ID", default=0), _number(variables, "SLURM_STEP_ID")
    return Launch(
        "srun",
        rank=_number(variables, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(variables, "SLURM_LOCALID", default=0),
        local_world_size=_local_tasks(variables, world_size),
        master_address=variables.get("MASTER_ADDR") or _first_node(variables),
        # Every task must compute the same port, and two jobs on one node different ones.
        master_port=_number(variables, "MASTER_PORT", default=20000 + (job * 7 + step) % 12000),
    )


def _local_tasks(variables: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node, out of SLURM_STEP_TASKS_PER_NODE such as `2(x3),1`."""
    counts: list[int] = []
    for item in variables.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(variables, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else world_size


def _first_node(variables: Mapping[str, str]) -> str:
    """The node of rank 0: the first of a list such as `gpu[07-09,11],login1`."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "")
    if _number(variables, "SLURM_STEP_NUM_NODES", default=0) == 1 or not nodes:
        return LOCALHOST
    first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    return first[1] + (first[2] or "") + (first[3] if first[2] else "") if first else LOCALHOST


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"-?\d+", text):
        found = "missing" if text is None else f'"{text}"'
        raise ConfigError(
            f"the environment variable {name} is {found}, but must be a whole number: start the ranks with "
            "torchrun or srun, or unset RANK, WORLD_SIZE and SLURM_PROCID."
        )
    return int(text)
