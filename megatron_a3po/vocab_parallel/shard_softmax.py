"""The softmax over a vocabulary that is split over ranks, for one chunk of tokens.

Each rank sees the columns of its shard. Four numbers per token say all the others need to know (with z the
logits):

    m = max z    s = sum exp(z - m)    u = sum exp(z - m) (z - m)    target = z[label], 0 on the other shards

One all-gather exchanges them, and with M = max m, S = sum s exp(m - M), U = sum exp(m - M) (u + (m - M) s):

    logp = target - M - log S              entropy = log S - U / S

The logits' buffer keeps exp(z - m) and, when the coefficient of each log-prob is known, becomes in place the
logits' gradient: coefficient * (onehot - softmax). Columns that only pad the vocabulary are no part of the
buffer. Statistics and buffer are float32 whatever the weights are. Next: `loss`, the sweep over chunks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group, all_gather, group_rank

LOWEST = torch.finfo(
    torch.float32
).min  # the maximum of a shard without columns; finite, so that 0 * (m - M) is 0
BLOCK_BYTES = 1 << 20  # rows exponentiated at a time on a CPU: they stay in the cache


@dataclass(frozen=True)
class VocabShard:
    """The columns start..start+size-1 of the true vocabulary, which this rank owns."""

    start: int
    size: int

    @classmethod
    def of(cls, weight: Float[Tensor, "shard hidden"], vocab_size: int, group: Group) -> "VocabShard":
        """Equal shards of the padded vocabulary; what lies beyond vocab_size is padding."""
        start = group_rank(group) * weight.shape[0]
        return cls(start, min(max(vocab_size - start, 0), weight.shape[0]))


class ShardSoftmax:
    """One chunk's softmax: made of the shard's logits, whose buffer it takes over."""

    logp: Float32[Tensor, "tokens"]
    entropy: Float32[Tensor, "tokens"]

    def __init__(
        self,
        logits: Float32[Tensor, "tokens shard"],
        labels: Int[Tensor, "tokens"],
        shard: VocabShard,
        temperature: float,
        group: Group,
    ):
        if temperature != 1.0:
            logits.div_(temperature)
        self.temperature = temperature
        self.here = (labels >= shard.start) & (labels < shard.start + shard.size)
        self.column = torch.where(self.here, labels - shard.start, 0)[:, None]
        own = logits.new_zeros(4, len(labels))
        if shard.size == 0:
            own[0] = LOWEST
        else:
            own[3] = torch.where(self.here, logits.gather(1, self.column)[:, 0], 0.0)
            own[0] = logits.amax(1)
            own[1], own[2] = _exponentiate_(logits, own[0])
        self.exponentials = logits
        self._merge(own[0], *all_gather(own, group).unbind(1))

    def _merge(
        self, own_max: Tensor, maxima: Tensor, sums: Tensor, products: Tensor, targets: Tensor
    ) -> None:
        highest = maxima.amax(0)
        below = maxima - highest
        scale = below.exp()
        total = (sums * scale).sum(0)
        log_total = total.log()
        self.logp = targets.sum(0) - highest - log_total
        self.entropy = log_total - ((products + below * sums) * scale).sum(0) / total
        self.own_scale = torch.exp(own_max - highest - log_total)  # softmax = exponentials * own_scale

    def logits_gradient_(self, coefficient: Float32[Tensor, "tokens"]) -> Float32[Tensor, "tokens shard"]:
        """The shard's logits' gradient, coefficient being dloss/dlogp; consumes the buffer."""
        if self.exponentials.shape[1] == 0:
            return self.exponentials
        coefficient = coefficient / self.temperature
        gradient = self.exponentials.mul_(-(coefficient * self.own_scale)[:, None])
        return gradient.scatter_add_(1, self.column, torch.where(self.here, coefficient, 0.0)[:, None])


def _exponentiate_(logits: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """logits <- exp(logits - max) in place; returns sum exp(z - m) and sum exp(z - m) (z - m) of each row.

    The second sum needs both z - m and its exponential: a block of rows at a time, so that no second buffer
    exists.
    """
    num_rows, num_columns = logits.shape
    block = max(1, BLOCK_BYTES // (4 * num_columns)) if logits.device.type == "cpu" else num_rows
    sums, products = torch.empty_like(maxima), torch.empty_like(maxima)
    for start in range(0, num_rows, block):
        rows = slice(start, start + block)
        shifted = logits[rows].sub_(maxima[rows, None])
        exponentials = shifted.exp()
        sums[rows] = exponentials.sum(1)
        products[rows] = torch.linalg.vecdot(exponentials, shifted)
        shifted.copy_(exponentials)
    return sums, products
