"""Conversion of checkpoints on disk, both ways, a few tensors at a time and without building the model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_a3po.config import read_model_shape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.errors import InputError
from megatron_a3po.weights.aside import aside_of, drop_aside, replaced_of
from megatron_a3po.weights.families import Table, table_of
from megatron_a3po.weights.hugging_face import MAX_SHARD_BYTES, write_hugging_face
from megatron_a3po.weights.manifest import check_input
from megatron_a3po.weights.megatron_checkpoint import Ranks, check_layout, write_megatron_checkpoint
from megatron_a3po.weights.megatron_reader import MegatronReader
from megatron_a3po.weights.sources import SafetensorsSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_FILES = ("config.json", ".metadata")  # one of them is in every folder that --overwrite may replace
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be run. `num_elements` is how far `run` will advance."""

    num_elements: int
    run: Callable[[Advance], None]


def hugging_face_to_megatron(
    source: Path, output: Path, *, ranks: Ranks, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Conversion:
    """Errors: InputError where `source` is not whole, is of no known family, damaged or cannot be cut for `ranks`."""
    output = _checked_output(source, output, overwrite)
    table = table_of(read_model_shape(source))
    tensors = SafetensorsSource(source, table)
    padded = ActorSection(tensor_model_parallel_size=ranks.tensor_model_parallel_size).padded_vocab_size(
        table.shape.vocab_size
    )
    check_layout(table, ranks, padded)
    check_input(source)

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
    output = _checked_output(source, output, overwrite)
    reader = MegatronReader(source)
    if not (reader.template / "config.json").is_file():
        raise InputError(
            f"{reader.template}/config.json is missing, which says what model it is: put the model's config.json and "
            "tokenizer there"
        )
    announced = reader.announced(dtype)
    check_input(reader.directory)

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


def _checked_output(source: Path, output: Path, overwrite: bool) -> Path:
    """In full, once it may be written. Whatever a writer would remove on its way is looked at."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} is no folder but a file or a link: give another name")
    source, full = source.resolve(), output.resolve()
    removed = {full, aside_of(full), replaced_of(full)} if full.name else {full}
    if removed & {source, *source.parents} or (output.exists() and source in full.parents):
        raise InputError(
            f"{output} holds what is to be converted, or would be written over it: give another folder"
        )
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already: give another folder, or --overwrite to replace it")
    if (
        output.exists()
        and any(full.iterdir())
        and not any((full / name).is_file() for name in CHECKPOINT_FILES)
    ):
        raise InputError(
            f"{output} is no checkpoint, and --overwrite replaces only those and empty folders: give another folder"
        )
    return full
