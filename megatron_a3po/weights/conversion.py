"""Conversion of checkpoints on disk, both ways, a few tensors at a time and without building the model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_a3po.config import read_model_shape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.errors import InputError
from megatron_a3po.weights.aside import drop_aside
from megatron_a3po.weights.families import Table, table_of
from megatron_a3po.weights.hugging_face import MAX_SHARD_BYTES, write_hugging_face
from megatron_a3po.weights.megatron_checkpoint import Ranks, write_megatron_checkpoint
from megatron_a3po.weights.megatron_reader import MegatronReader
from megatron_a3po.weights.sources import SafetensorsSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be run. `num_elements` is how far `run` will advance."""

    num_elements: int
    run: Callable[[Advance], None]


def hugging_face_to_megatron(
    source: Path, output: Path, *, ranks: Ranks, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Conversion:
    """Errors: InputError where `source` is not whole, is of no known family or cannot be cut for `ranks`."""
    table = table_of(read_model_shape(source))
    tensors = SafetensorsSource(source, table)
    _check_output(source, output, overwrite)
    padded = ActorSection(tensor_model_parallel_size=ranks.tensor_model_parallel_size).padded_vocab_size(
        table.shape.vocab_size
    )

    def run(advance: Advance) -> None:
        write_megatron_checkpoint(
            tensors,
            table,
            output,
            template=source,
            ranks=ranks,
            padded_vocab_size=padded,
            dtype=dtype,
            advance=advance,
        )

    return Conversion(num_elements(table), run)


def megatron_to_hugging_face(
    source: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Conversion:
    """Errors: InputError where `source` is no checkpoint, or does not hold its model's tensors."""
    reader = MegatronReader(source)
    announced = reader.announced(dtype)
    _check_output(source, output, overwrite)

    def run(advance: Advance) -> None:
        try:
            write_hugging_face(
                reader.hugging_face_tensors(dtype, advance),
                announced,
                output,
                template=reader.template,
                peers=None,
                lasting=True,
                max_shard_bytes=max_shard_bytes,
            )
        finally:
            drop_aside(output)  # where a tensor could not be read

    return Conversion(num_elements(reader.table), run)


def num_elements(table: Table) -> int:
    return sum(math.prod(size) for size in table.tensors.values())


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise InputError(f"{output} holds what is to be converted: give another folder")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already: give another folder, or --overwrite to replace it")
