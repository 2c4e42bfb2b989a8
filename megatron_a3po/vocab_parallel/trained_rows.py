"""Which rows of the hidden states are trained, and how they reach the ranks that need them, chunk by chunk.

Nothing but trained rows is projected onto the vocabulary. Without sequence parallelism every tensor-parallel rank
holds all rows and picks the same ones; their hidden gradients are partial sums over the vocabulary shards, completed
by an all-reduce. With it each rank holds a slice of the sequence, with its own number of trained rows: every chunk
takes an even share of each rank's,

    load      select own rows of the chunk -> pad to the largest share -> all-gather -> the valid ones, rank by rank
    return    lay out like that -> reduce-scatter -> own rows

so no rank ever holds more than a chunk of the others' rows. Loads are started a chunk ahead and returns waited for a
chunk later. Counts and indices come from the packer as host numbers: nothing here waits for the device. Next: `sweep`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import (
    Group,
    Pending,
    group_rank,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
)
from megatron_a3po.vocab_parallel.token_fields import Tokens


@dataclass(frozen=True)
class TrainedRows:
    """Indices of the trained rows on this rank, and every rank's count of them.

    counts: one entry per tensor-parallel rank under sequence parallelism, one entry without.
    mask_length: of the mask they were taken from, if so; the hidden states must have as many rows.
    """

    local: Int[Tensor, "local_trained"]
    counts: tuple[int, ...]
    mask_length: int | None = None

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "rows"]) -> "TrainedRows":
        """The rows where a mask is True, all ranks holding all rows. Reads a mask on a device once."""
        _refuse_mask("mask", mask, 1, "[rows]")
        local = mask.nonzero()[:, 0]
        return cls(local, (len(local),), len(mask))

    @classmethod
    def of_masks(cls, masks: Bool[Tensor, "ranks rows"], tp_rank: int) -> "TrainedRows":
        """Under sequence parallelism: the masks of all ranks' slices, of which `tp_rank` is this rank's."""
        _refuse_mask("masks", masks, 2, "[ranks, rows]")
        return cls(masks[tp_rank].nonzero()[:, 0], tuple(masks.sum(1).tolist()), masks.shape[1])

    @property
    def total(self) -> int:
        """Trained tokens of the micro-batch, over all slices of the sequence."""
        return sum(self.counts)


def _refuse_mask(name: str, mask: Tensor, num_dims: int, shape: str) -> None:
    if mask.dtype != torch.bool or mask.dim() != num_dims:
        raise ValueError(
            f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, but must be torch.bool of shape {shape}"
        )


@dataclass(frozen=True)
class Span:
    """One chunk: which trained tokens, and which of each rank's trained rows they are."""

    tokens: Tokens
    parts: tuple[range, ...]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.parts))


@runtime_checkable
class RowExchange(Protocol):
    """Hands out trained hidden states chunk by chunk and takes partial gradients back into `gradient`."""

    def spans(self, chunk_tokens: int) -> list[Span]:
        """The chunks of the call, the same on all ranks; sizes at most `chunk_tokens` + ranks - 1."""
        ...

    def start_load(self, span: Span) -> Callable[[], Tensor]:
        """Starts to bring in a chunk's hidden states [tokens, hidden]; calling the result gives them."""
        ...

    def start_return(self, span: Span, partial: Float[Tensor, "tokens hidden"]) -> None:
        """Starts the sum of the ranks' partial gradients; the last chunk's is put into `gradient` before."""
        ...

    def finish(self) -> Float[Tensor, "rows hidden"]:
        """The gradient of all rows of this rank."""
        ...


def row_exchange(
    hidden: Float[Tensor, "rows hidden"],
    rows: TrainedRows,
    group: Group,
    *,
    sequence_parallel: bool,
    differentiate: bool,
) -> RowExchange:
    """For `hidden` replicated over the group, or this rank's slice of the sequence."""
    gradient = torch.zeros_like(hidden) if differentiate else hidden
    if sequence_parallel and len(rows.counts) > 1:
        return _SlicedRows(hidden, rows, group, gradient)
    return _ReplicatedRows(hidden, rows, group, gradient)


class _Returning:
    """What both exchanges share: one return on its way at a time, and where it goes."""

    def __init__(self, hidden: Tensor, rows: TrainedRows, group: Group, gradient: Tensor):
        self.hidden, self.rows, self.group, self.gradient = hidden, rows, group, gradient
        self.on_its_way: tuple[Pending, range] | None = None

    def own_rows(self, part: range) -> Tensor:
        return self.rows.local[part.start : part.stop]

    def put_on_its_way(self, pending: Pending, part: range) -> None:
        self.finish()
        self.on_its_way = pending, part
        if pending.work is None:  # one rank: nothing to wait for, so nothing to keep
            self.finish()

    def finish(self) -> Tensor:
        if self.on_its_way is not None:
            pending, part = self.on_its_way
            self.gradient.index_copy_(0, self.own_rows(part), pending.wait()[: len(part)])
            self.on_its_way = None
        return self.gradient


class _ReplicatedRows(_Returning):
    def spans(self, chunk_tokens: int) -> list[Span]:
        runs = [parts[0] for parts in _even_parts((self.rows.total,), chunk_tokens)]
        return [Span(slice(run.start, run.stop), (run,)) for run in runs]

    def start_load(self, span: Span) -> Callable[[], Tensor]:
        return lambda: self.hidden.index_select(0, self.own_rows(span.parts[0]))

    def start_return(self, span: Span, partial: Tensor) -> None:
        self.put_on_its_way(start_all_reduce_(partial, self.group), span.parts[0])


class _SlicedRows(_Returning):
    def spans(self, chunk_tokens: int) -> list[Span]:
        counts, device = self.rows.counts, self.hidden.device
        before = [sum(counts[:tp_rank]) for tp_rank in range(len(counts))]

        def span(parts: tuple[range, ...]) -> Span:
            runs = [
                (first + part.start, first + part.stop) for first, part in zip(before, parts, strict=True)
            ]
            return Span(torch.cat([torch.arange(*run, device=device) for run in runs]), parts)

        return [span(parts) for parts in _even_parts(counts, chunk_tokens)]

    def start_load(self, span: Span) -> Callable[[], Tensor]:
        own = span.parts[group_rank(self.group)]
        padded = self.hidden.new_zeros(max(map(len, span.parts)), self.hidden.shape[1])
        torch.index_select(self.hidden, 0, self.own_rows(own), out=padded[: len(own)])
        gathering = start_all_gather(padded, self.group)

        def load() -> Tensor:
            shares = zip(gathering.wait(), span.parts, strict=True)
            return torch.cat([share[: len(part)] for share, part in shares])

        return load

    def start_return(self, span: Span, partial: Tensor) -> None:
        padded = partial.new_zeros(len(span.parts), max(map(len, span.parts)), partial.shape[1])
        shares = partial.split([len(part) for part in span.parts])
        for place, share in zip(padded, shares, strict=True):
            place[: len(share)] = share
        own = span.parts[group_rank(self.group)]
        self.put_on_its_way(start_reduce_scatter(padded, self.group), own)


def _even_parts(counts: tuple[int, ...], chunk_tokens: int) -> list[tuple[range, ...]]:
    """As few chunks as `chunk_tokens` allows, near equal, and of each rank's rows an even share in every one."""
    number = -(-sum(counts) // chunk_tokens)
    chunks = (tuple(range(k * c // number, (k + 1) * c // number) for c in counts) for k in range(number))
    return [parts for parts in chunks if any(parts)]
