"""How one Megatron-Core parameter is made of Hugging Face tensors, and how its shards become them again.

An operation is a pair of pure functions. `shard` reads just what tensor rank `tp_rank` owns through slice readers;
`merge` takes every tensor rank's shard and returns the full Hugging Face tensors. Both keep values bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_a3po.config import ModelShape


class SliceReader(Protocol):
    """A tensor that is read by slices: a safetensors slice or a tensor itself."""

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """What a shard depends on besides the tensors."""

    shape: ModelShape
    padded_vocab_size: int
    tp_rank: int
    tp_size: int


@dataclass(frozen=True)
class Operation:
    """`shard(sources, layout) -> Tensor`; `merge(every tensor rank's shards, shape) -> full tensors in table order`."""

    shard: Callable[[Sequence[SliceReader], Layout], Tensor]
    merge: Callable[[Sequence[Tensor], ModelShape], list[Tensor]]


def _part(size: int, layout: Layout) -> slice:
    each = size // layout.tp_size
    return slice(layout.tp_rank * each, (layout.tp_rank + 1) * each)


def _num_rows(source: SliceReader) -> int:
    sizes: Any = source  # a safetensors slice says its shape by a method
    return (sizes.get_shape() if hasattr(sizes, "get_shape") else sizes.shape)[0]


def _joined(shards: Sequence[Tensor], dim: int) -> Tensor:
    # One shard is the whole, and may be too large to be copied for nothing.
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


# Replicated over the tensor axis: norms, routers.
def _copy_merge(shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    for tp_rank, shard in enumerate(shards[1:], start=1):
        # A replica that drifted means a gradient was not summed over the tensor axis: never publish that.
        if not torch.equal(shards[0], shard):
            raise AssertionError(f"a replicated parameter differs between tensor ranks 0 and {tp_rank}")
    return [shards[0]]


copy = Operation(shard=lambda sources, layout: sources[0][:], merge=_copy_merge)


# Split along the input dimension: o_proj, down_proj.
def _row_shard(sources: Sequence[SliceReader], layout: Layout) -> Tensor:
    width = sources[0][:1].shape[1]
    return sources[0][:, _part(width, layout)]


row = Operation(shard=_row_shard, merge=lambda shards, shape: [_joined(shards, dim=1)])


# Split along the vocabulary, padded at its end with zeros that the loss layer never reads.
def _vocab_shard(sources: Sequence[SliceReader], layout: Layout) -> Tensor:
    part = _part(layout.padded_vocab_size, layout)
    rows = sources[0][part.start : min(part.stop, layout.shape.vocab_size)]
    return torch.nn.functional.pad(rows, (0, 0, 0, part.stop - part.start - rows.shape[0]))


vocabulary = Operation(
    shard=_vocab_shard, merge=lambda shards, shape: [_joined(shards, dim=0)[: shape.vocab_size]]
)


# Split along the output dimension: latent attention's projections.
column = Operation(
    shard=lambda sources, layout: sources[0][_part(_num_rows(sources[0]), layout)],
    merge=lambda shards, shape: [_joined(shards, dim=0)],
)


# gate_proj and up_proj, each split along the output dimension, then stacked.
def _gate_up_shard(sources: Sequence[SliceReader], layout: Layout) -> Tensor:
    return torch.cat([source[_part(_num_rows(source), layout)] for source in sources])


def _gate_up_merge(shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[index] for half in halves]) for index in (0, 1)]


gate_up = Operation(shard=_gate_up_shard, merge=_gate_up_merge)


# q, k and v interleaved by query group, each its queries, then its key, then its value (Megatron's SelfAttention).
def _qkv_shard(sources: Sequence[SliceReader], layout: Layout) -> Tensor:
    shape = layout.shape
    groups = _part(shape.num_query_groups, layout)
    heads_per_group = shape.num_attention_heads // shape.num_query_groups
    parts = []
    for source, width in zip(
        sources, (heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim), strict=True
    ):
        rows = source[groups.start * width : groups.stop * width]
        parts.append(rows.unflatten(0, (groups.stop - groups.start, width)))
    return torch.cat(parts, dim=1).flatten(0, 1)


def _qkv_merge(shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    heads_per_group = shape.num_attention_heads // shape.num_query_groups
    widths = [heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim]
    full = _joined(shards, dim=0).unflatten(0, (shape.num_query_groups, sum(widths)))
    return [part.flatten(0, 1) for part in full.split(widths, dim=1)]


qkv = Operation(shard=_qkv_shard, merge=_qkv_merge)
