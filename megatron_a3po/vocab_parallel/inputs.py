"""What a call's arguments must be, each refused in one sentence before something else would come of it in silence.

Host numbers, shapes and dtypes alone: nothing is read from the device. So labels outside the vocabulary, rows that are
not there and a temperature per token that is not positive are not found out. Next: `limits`, what the layer cannot do.
"""

import math

import torch
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group, group_rank, group_size
from megatron_a3po.vocab_parallel.token_fields import TokenFields
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows

INTEGERS = ("labels", "staleness", "sequence_ids")
DTYPES = (torch.float32, torch.bfloat16)


def refuse_matrices(hidden: Tensor, weight: Tensor) -> None:
    """[rows, hidden] and [shard, hidden], both float32 or both bfloat16."""
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}, but must have two dimensions")
        if matrix.dtype not in DTYPES:
            raise ValueError(f"{name} is {matrix.dtype}, but must be torch.float32 or torch.bfloat16")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}, but both must be the same")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {hidden.shape[1]} wide, but weight {weight.shape[1]}")


def refuse_rows(hidden: Tensor, rows: TrainedRows, group: Group, sequence_parallel: bool) -> None:
    """Counts of the right ranks, and indices of these hidden states."""
    entries = group_size(group) if sequence_parallel else 1
    if len(rows.counts) != entries:
        raise ValueError(
            f"rows.counts has {len(rows.counts)} entries, but must have {entries}: under sequence parallelism every "
            "rank's count (`TrainedRows.of_masks`), otherwise one (`TrainedRows.of_mask`)"
        )
    refuse_vector("rows.local", rows.local, None, integers=True)
    own = rows.counts[group_rank(group) if sequence_parallel else 0]
    if len(rows.local) != own:
        raise ValueError(f"rows.local has {len(rows.local)} rows, but rows.counts says {own} for this rank")
    if own > len(hidden):
        raise ValueError(f"{own} rows are trained, but hidden has {len(hidden)}")
    if rows.mask_length not in (None, len(hidden)):
        raise ValueError(
            f"the mask of the rows is {rows.mask_length} long, but hidden has {len(hidden)} rows"
        )


def refuse_numbers(
    weight: Tensor, total: int, vocab_size: int, temperature: float | Tensor, group: Group, chunk_tokens: int
) -> None:
    """A vocabulary the shards hold, a temperature and a chunk that are positive."""
    for name, number in (("vocab_size", vocab_size), ("chunk_tokens", chunk_tokens)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is {number}, but must be a whole number of 1 or more")
    ranks = group_size(group)
    if vocab_size > ranks * len(weight):
        raise ValueError(
            f"vocab_size is {vocab_size}, but {ranks} shards of {len(weight)} rows hold {ranks * len(weight)}"
        )
    if isinstance(temperature, Tensor):
        refuse_vector("temperature", temperature, total, integers=False)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be a positive number")


def refuse_fields(fields: TokenFields, total: int) -> None:
    """One entry for each trained token."""
    for name, vector in vars(fields).items():
        if isinstance(vector, Tensor):
            refuse_vector(name, vector, total, integers=name in INTEGERS)


def refuse_vector(name: str, vector: Tensor, total: int | None, *, integers: bool) -> None:
    """A vector, as long as there are trained tokens."""
    if vector.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, but must be a vector over the trained tokens"
        )
    if total is not None and len(vector) != total:
        raise ValueError(f"{name} has {len(vector)} entries, but there are {total} trained rows")
    wanted = vector.dtype.is_floating_point is not integers
    if not wanted or vector.dtype == torch.bool:
        kind = "whole" if integers else "floating-point"
        raise ValueError(f"{name} is {vector.dtype}, but must hold {kind} numbers")
