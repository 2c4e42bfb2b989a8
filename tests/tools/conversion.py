"""The conversion command run in a forked process, and small checkpoints of every family to run it on."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from tests.distributed.ranks import run_ranks
from tests.weights.checkpoints import COMMON, DENSE, write_checkpoint, write_dense
from tests.weights.test_expert_families import COMMON as EXPERTS_COMMON
from tests.weights.test_expert_families import CONFIGS as EXPERTS
from tools import convert_checkpoint

RANKS = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]


@dataclass
class Ended:
    code: int
    output: str
    error: str


def commands(*argvs: list[Any], prepare: Any = None) -> list[Ended]:
    """The commands one after the other in one forked process, which `prepare` is called in first."""

    def on_rank(rank: int, world_size: int) -> list[Ended]:
        if prepare is not None:
            prepare()
        return [ended_by([str(argument) for argument in argv]) for argv in argvs]

    return run_ranks(on_rank, 1, joined=False)[0]


def ended_by(argv: list[str]) -> Ended:
    output, error = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(error):
        code = convert_checkpoint.main(argv)
    return Ended(code, output.getvalue(), error.getvalue())


def command(*argv: Any, prepare: Any = None) -> Ended:
    return commands(list(argv), prepare=prepare)[0]


def qwen2_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**COMMON, **changes})


def write_family(folder: Path, family: str) -> Path:
    if family in DENSE:
        return write_dense(folder, family)
    config, keys = EXPERTS[family]
    write_checkpoint(folder, config(**EXPERTS_COMMON, **keys))
    for file in folder.glob("*.safetensors"):  # buffers, which start as zeros
        tensors = load_file(file)
        biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
        tensors |= {name: torch.randn(tensors[name].shape) * 0.05 for name in biases}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
