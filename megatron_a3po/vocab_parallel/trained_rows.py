"""Which rows of the hidden states are trained: nothing else is projected onto the vocabulary.

Without sequence parallelism every tensor-parallel rank holds all rows and picks the same ones; their hidden
gradients are partial sums over the vocabulary shards, one all-reduce completes them. With it each rank holds
a slice of the sequence with its own number of trained rows:

    forward    select local rows -> pad to the largest count -> one all-gather -> the valid ones, in order
    backward   scatter into the padded layout -> one reduce-scatter -> the first `counts[rank]` are local

Counts and indices come from the packer as host numbers, so nothing here waits for the device. Next: `loss`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import (
    Group,
    all_gather,
    all_reduce_,
    group_rank,
    reduce_scatter,
)


@dataclass(frozen=True)
class TrainedRows:
    """Indices of the trained rows on this rank, and every rank's count of them.

    counts: one entry per tensor-parallel rank under sequence parallelism, one entry without.
    """

    local: Int[Tensor, "local_trained"]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Trained tokens of the micro-batch, over all slices of the sequence."""
        return sum(self.counts)


@runtime_checkable
class RowSource(Protocol):
    """Hands out trained hidden states chunk by chunk and takes the sum of their gradients back."""

    def chunk(self, start: int, stop: int) -> Float[Tensor, "tokens hidden"]:
        """Hidden states of the trained tokens start..stop-1."""
        ...

    def reduce(self, partial: Float[Tensor, "trained hidden"]) -> Float[Tensor, "local_trained hidden"]:
        """This rank's trained rows' complete gradients from every rank's partial sums; may reuse `partial`."""
        ...


def row_source(
    hidden: Float[Tensor, "rows hidden"], rows: TrainedRows, group: Group, sequence_parallel: bool
) -> RowSource:
    """The source for a layout: `hidden` is replicated over the group, or this rank's slice of the sequence."""
    if sequence_parallel and len(rows.counts) > 1:
        return _SlicedRows(hidden, rows, group)
    return _ReplicatedRows(hidden, rows, group)


class _ReplicatedRows:
    def __init__(self, hidden: Tensor, rows: TrainedRows, group: Group):
        self.hidden, self.local, self.group = hidden, rows.local, group

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.hidden.index_select(0, self.local[start:stop])

    def reduce(self, partial: Tensor) -> Tensor:
        return all_reduce_(partial, self.group)


class _SlicedRows:
    def __init__(self, hidden: Tensor, rows: TrainedRows, group: Group):
        self.group, self.count = group, rows.counts[group_rank(group)]
        self.padded_shape = (len(rows.counts), max(rows.counts), hidden.shape[1])
        self.valid = [slice(0, count) for count in rows.counts]
        padded = hidden.new_zeros(self.padded_shape[1:])
        padded[: self.count] = hidden.index_select(0, rows.local)
        gathered = all_gather(padded, group)
        self.trained = torch.cat([part[valid] for part, valid in zip(gathered, self.valid, strict=True)])

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.trained[start:stop]

    def reduce(self, partial: Tensor) -> Tensor:
        padded, start = partial.new_zeros(self.padded_shape), 0
        for part, valid in zip(padded, self.valid, strict=True):
            part[valid] = partial[start : start + valid.stop]
            start += valid.stop
        return reduce_scatter(padded, self.group)[: self.count]
