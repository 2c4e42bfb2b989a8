"""The three matrix products of the layer: all its work, 2 flops per token, hidden and vocabulary element
each.

    logits             hidden @ weight.T
    hidden gradient    logits gradient @ weight
    weight gradient    logits gradient.T @ hidden

In half precision a GPU multiplies half-precision operands and hands out float32 where it is kept (logits,
weight gradient); a CPU has no such product, and upcasts the small operand instead.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def project_(
    logits: Float32[Tensor, "tokens shard"],
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "shard hidden"],
) -> Float32[Tensor, "tokens shard"]:
    """logits <- hidden @ weight.T."""
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=logits)
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
    return logits.copy_(torch.mm(hidden, weight.T))


def hidden_gradient_(
    out: Float[Tensor, "tokens hidden"],
    gradient: Float32[Tensor, "tokens shard"],
    weight: Float[Tensor, "shard hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """out <- gradient @ weight, in the dtype of the hidden states."""
    return torch.mm(gradient.to(weight.dtype), weight, out=out)


def add_weight_gradient_(
    total: Float[Tensor, "shard hidden"],
    gradient: Float32[Tensor, "tokens shard"],
    hidden: Float[Tensor, "tokens hidden"],
) -> Float[Tensor, "shard hidden"]:
    """total <- total + gradient.T @ hidden, in the dtype of `total`: float32 but for a bf16 main gradient."""
    if total.dtype == torch.float32 and hidden.device.type == "cpu":
        return total.addmm_(gradient.T, hidden.float())
    if total.dtype == torch.float32 and hidden.dtype != torch.float32:
        return total.add_(torch.mm(gradient.to(hidden.dtype).T, hidden, out_dtype=torch.float32))
    return total.addmm_(gradient.to(total.dtype).T, hidden.to(total.dtype))
