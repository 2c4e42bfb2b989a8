"""The elementwise part of a sweep: logits to exponentials, and the sums over each row on the way.

All of it is float32 arithmetic on float32 logits. float32 exponentials take the place of the logits, others
are rounded when they are stored, after the sums. With `scale`, 1 / temperature of each row, z = scale * logits.

Plain torch does it a block of rows at a time, small enough to stay in the cache, so the chunk of logits is read and
written once and no second buffer of its size exists. On a GPU with Triton one kernel does the same: `triton_kernels`.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float, Float32
from torch import Tensor

# Rows exponentiated at a time: on a CPU they and their scratch stay in its cache.
BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 27}


def kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels where there are a GPU and Triton; None: plain torch, the kernels' reference."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from megatron_a3po.vocab_parallel import triton_kernels

        return triton_kernels
    return None


def exponentiate_(
    logits: Float32[Tensor, "tokens shard"],
    exponentials: Float[Tensor, "tokens shard"],
    numbers: Float32[Tensor, "3 tokens"],
    scale: Float32[Tensor, "tokens"] | None = None,
) -> None:
    """exponentials <- exp(z - max); numbers <- max, sum exp(z - max), sum exp(z - max) (z - max) of each row."""
    match kernels(logits.device):
        case None:
            maxima, sums, products = numbers
            for rows, block, scratch in _blocks(logits):
                maxima[rows] = block.amax(1)
                torch.sub(block, maxima[rows, None], out=scratch)
                if scale is not None:
                    scratch.mul_(scale[rows, None])
                torch.exp(scratch, out=block)
                torch.sum(block, 1, out=sums[rows])
                torch.sum(scratch.mul_(block), 1, out=products[rows])
                _store(block, exponentials[rows])
            if scale is not None:
                maxima.mul_(scale)
        case triton:
            triton.exponentiate_(logits, exponentials, numbers, scale)


def exponentiate_at_(
    logits: Float32[Tensor, "tokens shard"],
    exponentials: Float[Tensor, "tokens shard"],
    offset: Float32[Tensor, "tokens"],
    scale: Float32[Tensor, "tokens"] | None = None,
) -> None:
    """exponentials <- exp(scale * logits - offset)."""
    match kernels(logits.device):
        case None:
            for rows, block, _ in _blocks(logits):
                if scale is not None:
                    block.mul_(scale[rows, None])
                _store(block.sub_(offset[rows, None]).exp_(), exponentials[rows])
        case triton:
            triton.exponentiate_at_(logits, exponentials, offset, scale)


def add_entropy_gradient_(
    exponentials: Float[Tensor, "tokens shard"],
    factor: Float32[Tensor, "tokens"],
    slope: Float32[Tensor, "tokens"],
) -> None:
    """E <- (factor + slope * log E) * E, and 0 where E is 0."""
    match kernels(exponentials.device):
        case None:
            tiny = torch.finfo(exponentials.dtype).tiny
            for rows, block, scratch in _blocks(exponentials):
                scratch.copy_(block).clamp_(min=tiny).log_().mul_(slope[rows, None]).add_(factor[rows, None])
                block.mul_(scratch)
        case triton:
            triton.add_entropy_gradient_(exponentials, factor, slope)


def _store(block: Tensor, exponentials: Tensor) -> None:
    if exponentials.dtype != block.dtype:  # otherwise it is there already
        exponentials.copy_(block)


def _blocks(
    logits: Float[Tensor, "tokens shard"],
) -> Iterator[tuple[slice, Float[Tensor, "rows shard"], Float32[Tensor, "rows shard"]]]:
    """(which rows, the rows, scratch of their shape)."""
    num_rows, num_columns = logits.shape
    size = min(max(1, BLOCK_BYTES[logits.device.type] // (4 * num_columns)), num_rows)
    scratch = torch.empty_like(logits[:size], dtype=torch.float32)
    for start in range(0, num_rows, size):
        block = logits[start : start + size]
        yield slice(start, start + len(block)), block, scratch[: len(block)]
