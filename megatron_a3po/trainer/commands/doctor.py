"""`doctor [--slurm [JOB]]`: what this machine has, and which code paths a run here will use; what a Slurm job sees.

It looks and reports, changes nothing and needs no configuration. Versions come from package metadata; what must be
asked of a library itself (is there a GPU?) is asked in one place.
"""

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_a3po.environment import read_launch, slurm_variables
from megatron_a3po.errors import EXIT_DONE
from megatron_a3po.trainer import slurm_job

MISSING = "not installed"
NVIDIA_APEX_PARTS = ("optimizers", "multi_tensor_apply")
SUPPORTED_MEGATRON = ((0, 16, 1), (0, 20))


@dataclass(frozen=True)
class Machine:
    """What the code paths depend on."""

    gpus: tuple[str, ...]
    torch: str | None
    megatron_core: str | None
    transformer_engine: str | None
    has_apex: bool

    @property
    def has_gpu(self) -> bool:
        return bool(self.gpus)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is 0, for a missing package is a finding, not a failure.

    Errors: InputError where --slurm finds no job.
    """
    if arguments.slurm:
        _print({"That job": slurm_job.describe_job(arguments.slurm)})
        return EXIT_DONE
    in_a_job = arguments.slurm is not None
    job = {"This job": slurm_job.rows(slurm_variables(), read_launch())} if in_a_job else {}
    machine = look()
    sections = {
        "This machine": hardware(machine),
        "Packages": packages(machine),
        "A run here uses": paths(machine),
    }
    _print(job | sections)
    return EXIT_DONE


def _print(sections: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    for title, rows in sections.items():
        sys.stdout.write(f"{title}\n" + "".join(f"  {name:<22}{finding}\n" for name, finding in rows))


def look() -> Machine:
    """Find out what the code paths depend on."""
    return Machine(
        gpus=_gpus(),
        torch=installed("torch"),
        megatron_core=installed("megatron-core"),
        transformer_engine=installed("transformer-engine") or installed("transformer-engine-torch"),
        has_apex=has_nvidia_apex(),
    )


def hardware(machine: Machine) -> list[tuple[str, str]]:
    """Processor, GPUs and who started this process."""
    launched = read_launch()
    started = (
        launched.launcher
        if launched.world_size is None
        else f"{launched.launcher}, {launched.world_size} ranks"
    )
    return [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        ("GPU", ", ".join(machine.gpus) or "none: everything runs on the CPU"),
        ("launcher", started),
    ]


def packages(machine: Machine) -> list[tuple[str, str]]:
    """Versions, and what a missing package means."""
    return [
        ("torch", machine.torch or f"{MISSING}: nothing can be trained"),
        ("Megatron-Core", _megatron(machine)),
        ("transformers", installed("transformers") or f"{MISSING}: the local engine and tokenizers need it"),
        ("Transformer Engine", machine.transformer_engine or f"{MISSING}: layers are plain torch"),
        ("NVIDIA Apex", _apex(machine)),
        ("vLLM", installed("vllm") or f"{MISSING}: rollout.engine=vllm needs it where its servers run"),
    ]


def paths(machine: Machine) -> list[tuple[str, str]]:
    """The code path behind each part of a training step."""
    has_engine = machine.transformer_engine is not None and machine.has_gpu
    if has_engine:
        attention, norm = "Transformer Engine, variable length", "Transformer Engine"
    elif machine.has_gpu:
        attention, norm = "torch varlen_attn in bf16, one SDPA for each sequence in fp32", "torch"
    else:
        attention, norm = "torch, one SDPA for each sequence", "torch"
    if has_engine:
        optimizer = "Transformer Engine's FusedAdam"
    elif machine.has_apex and machine.has_gpu:
        optimizer = "NVIDIA Apex's FusedAdam"
    else:
        optimizer = "torch's AdamW"
    return [
        ("attention", attention),
        ("norm", norm),
        ("optimizer", f"{optimizer}, under Megatron-Core's distributed optimizer"),
        ("communication", "NCCL" if machine.has_gpu else "gloo"),
        ("engine", "local (a Hugging Face model inside the rollout process)"),
    ]


def installed(distribution: str) -> str | None:
    """The version of an installed package, None if there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def has_nvidia_apex(folders: Sequence[str] | None = None) -> bool:
    """Whether `apex` is NVIDIA's: the package of that name on PyPI is something else and has no optimizers.

    Looks into the package's folders without importing it, for the other one fails on import.
    """
    if folders is None:
        spec = importlib.util.find_spec("apex")
        folders = (spec and spec.submodule_search_locations) or ()
    return any((Path(folder) / part).is_dir() for folder in folders for part in NVIDIA_APEX_PARTS)


def _apex(machine: Machine) -> str:
    if machine.has_apex:
        return installed("apex") or "installed"
    if importlib.util.find_spec("apex") is not None or installed("apex"):
        return "an `apex` is installed, but it is not NVIDIA's (no apex.optimizers): uninstall it"
    return f"{MISSING}: not needed"


def _megatron(machine: Machine) -> str:
    found = machine.megatron_core
    if found is None:
        return f"{MISSING}: nothing can be trained"
    lowest, above = SUPPORTED_MEGATRON
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if lowest <= numbers < above:
        return found
    wanted = f">={'.'.join(map(str, lowest))},<{'.'.join(map(str, above))}"
    return f"{found}, which is outside of the supported {wanted}"


def _gpus() -> tuple[str, ...]:
    """Names and memory of the GPUs torch can use."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return tuple(found)
