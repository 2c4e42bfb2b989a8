"""The three matrix products of the layer: all its work, 2 flops per token, hidden and vocabulary element each.

    logits             rows @ weight.T
    hidden gradient    E @ weight
    weight gradient    E.T @ rows

A GPU multiplies in the weight's precision and hands out float32. A CPU multiplies in float32 whatever the weight is,
and widens a bfloat16 weight a block of the vocabulary at a time.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32
from torch import Tensor

BLOCK = 4096  # vocabulary elements widened at a time


def arithmetic_dtype(weight: Float[Tensor, "shard hidden"]) -> torch.dtype:
    """Precision of what is multiplied: the rows, and the exponentials' buffer. Results are float32."""
    return weight.dtype if weight.device.type == "cuda" else torch.float32


def project_(
    logits: Float32[Tensor, "tokens shard"],
    rows: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "shard hidden"],
) -> Float32[Tensor, "tokens shard"]:
    """logits <- rows @ weight.T."""
    if weight.dtype == torch.float32:
        return torch.mm(rows, weight.T, out=logits)
    if rows.dtype == weight.dtype:
        return torch.mm(rows, weight.T, out_dtype=torch.float32, out=logits)
    for columns, part in _widened(weight):
        torch.mm(rows, part.T, out=logits[:, columns])
    return logits


def multiply_weight(
    exponentials: Float[Tensor, "tokens shard"], weight: Float[Tensor, "shard hidden"]
) -> Float32[Tensor, "tokens hidden"]:
    """exponentials @ weight, in float32."""
    if exponentials.dtype != weight.dtype:
        product = exponentials.new_zeros(len(exponentials), weight.shape[1])
        for columns, part in _widened(weight):
            product.addmm_(exponentials[:, columns], part)
        return product
    if weight.dtype == torch.float32:
        return torch.mm(exponentials, weight)
    return torch.mm(exponentials, weight, out_dtype=torch.float32)


def add_weight_gradient_(
    total: Float[Tensor, "shard hidden"],
    exponentials: Float[Tensor, "tokens shard"],
    rows: Float[Tensor, "tokens hidden"],
) -> None:
    """total <- total + exponentials.T @ rows, in the dtype of `total`: float32, but for a bfloat16 main gradient."""
    if total.dtype == exponentials.dtype:
        torch.addmm(total, exponentials.T, rows, out=total)
    elif total.dtype == torch.float32:
        torch.addmm(total, exponentials.T, rows, out_dtype=torch.float32, out=total)
    else:
        for start in range(0, len(total), BLOCK):
            columns = slice(start, start + BLOCK)
            total[columns] += torch.mm(exponentials[:, columns].T, rows)


def _widened(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(weight), BLOCK):
        part = weight[start : start + BLOCK]
        yield slice(start, start + len(part)), part.float()
