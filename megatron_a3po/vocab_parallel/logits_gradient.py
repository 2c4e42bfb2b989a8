"""The gradient of the loss by a chunk's logits, without ever writing it down.

For token i with c = dloss/dlogp and beta = -dloss/dentropy, p = softmax(z) and y the label:

    dloss/dz_j = c (1[j = y] - p_j) + beta p_j (log p_j + entropy)

Without an entropy term that is, off the target, a factor per row times E (`shard_softmax`), and at the target

    c (1 - p_y) + beta p_y (log p_y + entropy)

So the products of the buffer E with the weight and the hidden states, scaled row by row, are all of the gradient but
one rank-one correction per token: a row of the weight into the hidden gradient, a hidden state into a row of the
weight gradient. With an entropy term E is multiplied by its own factor first, in place. 1 / temperature, by the chain
rule, is in both factors. Next: `gradients`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from megatron_a3po.vocab_parallel.exponentials import add_entropy_gradient_
from megatron_a3po.vocab_parallel.shard_softmax import ShardExponentials, Softmax


@dataclass(frozen=True)
class LogitsGradient:
    """By the logits before the temperature: row_factor * E off the target, target_value at it (0 if elsewhere)."""

    row_factor: Float32[Tensor, "tokens"]
    target_value: Float32[Tensor, "tokens"]

    @classmethod
    def of(
        cls,
        shard: ShardExponentials,
        softmax: Softmax,
        by_logp: Float32[Tensor, "tokens"],
        by_entropy: Float32[Tensor, "tokens"] | None,
    ) -> "LogitsGradient":
        """From c = dloss/dlogp and dloss/dentropy = -beta; the latter rewrites E in place."""
        log_scale = (shard.offset - softmax.highest) - softmax.log_sum
        row_factor, target_value = -by_logp * log_scale.exp(), by_logp * softmax.others
        if by_entropy is not None:
            slope = -by_entropy * log_scale.exp()
            at_one = row_factor + slope * (log_scale + softmax.entropy)  # of E = 1: log p_j = log_scale
            if shard.exponentials.shape[1] > 0:
                add_entropy_gradient_(shard.exponentials, at_one, slope)
            row_factor = torch.ones_like(row_factor)
            surprise = softmax.logp.exp() * (softmax.logp + softmax.entropy)
            target_value = target_value - by_entropy * surprise
        if shard.scale is not None:
            row_factor, target_value = row_factor * shard.scale, target_value * shard.scale
        return cls(row_factor, torch.where(shard.target.here, target_value, 0.0))
