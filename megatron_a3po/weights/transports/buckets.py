"""Tensors packed into buckets of bytes: so many together that a transfer is of bandwidth and not of calls.

The plan of the buckets follows from what is announced, the same for every version. The other side gets it as JSON.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_a3po.weights.safetensors_file import Announced, split_by_size

ALIGNMENT = 16  # a tensor is a view of its bucket, and so begins where any type may begin


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together. `offsets` are where each begins."""

    tensors: tuple[Announced, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The same in words that the receiving side reads."""
        tensors = [
            [one.name, str(one.dtype).removeprefix("torch."), list(one.shape), offset]
            for one, offset in zip(self.tensors, self.offsets, strict=True)
        ]
        return {"num_bytes": self.num_bytes, "tensors": tensors}


def plan_buckets(announced: Iterable[Announced], max_bytes: int) -> list[Bucket]:
    """In order; a tensor larger than `max_bytes` is a bucket of its own."""
    return [_bucket(tensors) for tensors in split_by_size(announced, max_bytes)]


def pack(tensors: Iterator[tuple[str, Tensor]], bucket: Bucket, out: Tensor) -> None:
    """Take the bucket's tensors from the stream and lay them into `out`, bytes of any device."""
    for wanted, offset in zip(bucket.tensors, bucket.offsets, strict=True):
        name, tensor = next(tensors)
        assert (name, tuple(tensor.shape), tensor.dtype) == (wanted.name, wanted.shape, wanted.dtype), (
            f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {wanted} was announced"
        )
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        out[offset : offset + wanted.num_bytes].copy_(raw)


def _bucket(tensors: Sequence[Announced]) -> Bucket:
    offsets: list[int] = []
    end = 0
    for one in tensors:
        offsets.append(end)
        end += one.num_bytes + -one.num_bytes % ALIGNMENT
    return Bucket(tuple(tensors), tuple(offsets), end)
