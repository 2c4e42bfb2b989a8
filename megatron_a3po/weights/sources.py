"""Where full tensors by Hugging Face name come from: safetensors files, or one seed."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import Table
from megatron_a3po.weights.operations import SliceReader


class SafetensorsSource(Mapping[str, SliceReader]):
    """The safetensors shards of a Hugging Face directory, memory mapped; a tensor is read by slices."""

    def __init__(self, directory: Path) -> None:
        self._files = ExitStack()
        self._readers: dict[str, SliceReader] = {}
        for path in safetensors_files(directory):
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # safetensors raises its own untyped errors for damaged files
                raise InputError(
                    f"{path} cannot be read as safetensors ({error}); copy or download it again"
                ) from None
            self._readers |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> SliceReader:
        return self._readers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def safetensors_files(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, by its index where it has one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [
            directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{index} names {', '.join(missing)}, which is missing; copy it beside the index")
    if not files:
        raise InputError(
            f"{directory} holds no .safetensors file; point model.hf_path at a Hugging Face checkpoint in safetensors "
            "format, or start from random weights with model.initialization=random"
        )
    return files


class RandomSource(Mapping[str, SliceReader]):
    """Random weights of a model, every full tensor from (seed, its name): the same start in every layout."""

    def __init__(self, table: Table, seed: int) -> None:
        self._shapes, self._seed = table.tensors, seed
        self._std = table.shape.initializer_range
        self._norm = torch.zeros if table.shape.zero_centered_norms else torch.ones

    def __getitem__(self, name: str) -> Tensor:
        size = self._shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(size)
        if "norm" in name:
            return self._norm(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(size, generator=generator) * self._std

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
