"""The elementwise part of a sweep: logits to exponentials in place, and the sums over each row on the way.

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


def exponentiate_(logits: Float[Tensor, "tokens shard"], numbers: Float32[Tensor, "3 tokens"]) -> None:
    """logits <- exp(logits - max); numbers <- max, sum exp(z - max), sum exp(z - max) (z - max) of each row."""
    match kernels(logits.device):
        case None:
            maxima, sums, products = numbers
            for rows, block, scratch in _blocks(logits):
                maxima[rows] = block.amax(1)
                torch.sub(block, maxima[rows, None], out=scratch)
                _store_exp(scratch, block)
                torch.sum(block, 1, dtype=torch.float32, out=sums[rows])
                torch.sum(scratch.mul_(block), 1, out=products[rows])
        case triton:
            triton.exponentiate_(logits, numbers)


def exponentiate_at_(logits: Float[Tensor, "tokens shard"], offset: Float32[Tensor, "tokens"]) -> None:
    """logits <- exp(logits - offset)."""
    match kernels(logits.device):
        case None:
            for rows, block, scratch in _blocks(logits):
                torch.sub(block, offset[rows, None], out=scratch)
                _store_exp(scratch, block)
        case triton:
            triton.exponentiate_at_(logits, offset)


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


def _store_exp(source: Tensor, out: Tensor) -> None:
    if out.dtype == source.dtype:
        torch.exp(source, out=out)
    else:
        out.copy_(source.exp())


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
