"""What this rank writes of a checkpoint, and its copy in host memory.

A snapshot names the tensors of this moment. They may be copied while the next forward and backward run, in another
thread: training changes them only in the optimizer's step, which waits for the copy (`Actor.hold`).

Model and optimizer are boxes of whole tensors by Megatron-Core's names, those its "fully reshardable" checkpoints have,
so that every layout loads what any layout wrote. Megatron-Core gathers the optimizer's shards over the data axis first;
here every data rank writes its own part as it lies: a range of a flattened parameter is at most a few boxes of it, and
no rank talks to another. Writing is in `checkpoint.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, and its size


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `key` of `full_size`: it begins at `offset` and has this content."""

    key: str
    full_size: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Snapshot:
    """A rank's pieces and objects. ready: on a GPU, when the tensors have the values of its moment."""

    pieces: list[Piece]
    objects: list[tuple[str, Any]]
    ready: Any = None  # a torch.cuda.Event, of which torch has two classes

    @property
    def num_bytes(self) -> int:
        return sum(piece.tensor.nbytes for piece in self.pieces)


class HostMemory:
    """Where snapshots lie. Kept from one to the next, since fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def copy(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot that nothing changes until the next call. In any thread."""
        if snapshot.ready is None:
            return Snapshot(self._copies(snapshot), snapshot.objects)
        stream = torch.cuda.Stream(snapshot.pieces[0].tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(snapshot.ready)
            copies = self._copies(snapshot)
        stream.synchronize()
        return Snapshot(copies, snapshot.objects)

    def _copies(self, snapshot: Snapshot) -> list[Piece]:
        return [
            Piece(one.key, one.full_size, one.offset, self._place(one).copy_(one.tensor, non_blocking=True))
            for one in snapshot.pieces
        ]

    def _place(self, piece: Piece) -> Tensor:
        found = self._tensors.get((piece.key, piece.offset))
        if found is None or found.shape != piece.tensor.shape or found.dtype != piece.tensor.dtype:
            source = piece.tensor
            found = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda)
            self._tensors[piece.key, piece.offset] = found
        return found


def take(model: Mapping[str, Any], optimizers: Sequence[DistributedOptimizer]) -> Snapshot:
    """model: sharded state dicts of the stages. What other ranks hold too, the first of them writes."""
    values = [one for one in nested_values(dict(model)) if one is not None]
    built = [part for one in values for part in _built(one)]
    pieces = [
        Piece(one.key, one.global_shape, one.global_offset, _with_leading_axes(one.data, one))
        for one in built
        if isinstance(one, ShardedTensor) and is_main_replica(one.replica_id) and one.data is not None
    ]
    objects = [
        (one.unique_key, [one.data])
        for one in built
        if isinstance(one, ShardedObject) and is_main_replica(one.replica_id)
    ]
    by_parameter = {one.data: one for one in values if isinstance(one, ShardedTensor | ShardedTensorFactory)}
    for optimizer in optimizers:
        pieces += _of_optimizer(optimizer, by_parameter)
    on_gpu = any(piece.tensor.is_cuda for piece in pieces)
    return Snapshot(pieces, objects, torch.cuda.current_stream().record_event() if on_gpu else None)


def stored_names(state: Mapping[str, Any]) -> set[str]:
    """Under which names a sharded state dict lies in a checkpoint."""
    parts = [part for one in nested_values(dict(state)) for part in _built(one)]
    return {one.key for one in parts if isinstance(one, ShardedTensor)} | {
        one.unique_key for one in parts if isinstance(one, ShardedObject)
    }


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The boxes, in order, that the elements from `start` to `end` of a flattened tensor of `shape` make."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    rows = math.prod(shape[1:])
    first, last = -(-start // rows), end // rows  # the rows in between are whole
    if first > last:
        yield from _in_row(last, shape, start, end)
        return
    yield from _in_row(first - 1, shape, start, first * rows)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, shape, last * rows, end)


def _in_row(row: int, shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    begins = row * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - begins, end - begins):
        yield (row, *offset), (1, *size)


def _of_optimizer(optimizer: DistributedOptimizer, by_parameter: Mapping[Any, Any]) -> Iterator[Piece]:
    """Master weights and moments of the ranges this data rank keeps."""
    for by_dtype in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in by_dtype.values() for bucket in buckets):
            for parameter, ranges in bucket["param_map"].items():
                sharded, kept = by_parameter[parameter], ranges["param"]
                # The last axis of replicas is the data axis, over which the optimizer is cut: all of it writes.
                if any(sharded.replica_id[:-1]):
                    continue
                for name, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items():
                    if name != "step":  # kept with the groups of parameters
                        yield from _of_range(name, tensor, sharded, kept.start, kept.end)


def _of_range(name: str, tensor: Tensor, sharded: Any, start: int, end: int) -> Iterator[Piece]:
    """`tensor` is what belongs to the elements from `start` to `end` of this rank's flattened parameter."""
    for part in _built(sharded):
        # A factory's parts are views of the parameter, gate and up for one, and lie in it one behind the other.
        begins = part.data.storage_offset() - sharded.data.storage_offset()
        assert part.data.is_contiguous(), part.key
        low, high = max(start, begins), min(end, begins + part.data.numel())
        position = low - start
        for offset, size in boxes(part.local_shape, low - begins, high - begins):
            numel = math.prod(size)
            leading = part.global_offset[: part.prepend_axis_num]
            within = part.global_offset[part.prepend_axis_num :]
            yield Piece(
                f"optimizer.state.{name}.{part.key}",
                part.global_shape,
                (*leading, *(a + b for a, b in zip(within, offset, strict=True))),
                tensor[position : position + numel].view(*(1 for _ in leading), *size),
            )
            position += numel


def _built(one: Any) -> list[Any]:
    return list(nested_values(one.build())) if isinstance(one, ShardedTensorFactory) else [one]


def _with_leading_axes(data: Tensor, one: ShardedTensor) -> Tensor:
    return data.detach().view((1,) * one.prepend_axis_num + tuple(one.local_shape))
