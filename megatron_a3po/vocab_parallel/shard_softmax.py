"""The softmax over a vocabulary that is split over ranks, for one chunk of tokens.

Each rank sees the columns of its shard. Four numbers per token say all the others need to know. With z the logits, y
the label, and sums over this shard's columns other than y,

    m = max z_j    s = sum exp(z_j - m)    u = sum exp(z_j - m) (z_j - m)    t = z_y, 0 on the other shards

One all-gather exchanges them; with T = sum t the target's logit, M = max(max m, T) and sums over shards,

    R = sum s exp(m - M)        S = exp(T - M) + R        logp = T - M - log S        1 - p_y = R / S
    entropy = log S - (sum exp(m - M) (u + (m - M) s) + exp(T - M) (T - M)) / S

The target stands apart: 1 - p_y loses no digits, however sure the model is. The logits' buffer keeps E = exp(z - m), 0
at the target: off the target, softmax = exp(m - M) / S * E. That factor is a
number per row. It goes into the rows of the products, never through the buffer, and the hidden gradient's product can
run while the four numbers travel. Next: `logits_gradient`, the factors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group, Pending, group_rank, start_all_gather
from megatron_a3po.vocab_parallel.exponentials import exponentiate_, exponentiate_at_
from megatron_a3po.vocab_parallel.token_fields import Tokens


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


@dataclass(frozen=True)
class Target:
    """Each token's label as a column of the shard, and that row of the weight; column 0 where it is elsewhere."""

    here: Bool[Tensor, "tokens"]
    column: Int[Tensor, "tokens"]

    @classmethod
    def of(cls, labels: Int[Tensor, "tokens"], shard: VocabShard) -> "Target":
        """Where the labels are in this shard."""
        here = (labels >= shard.start) & (labels < shard.start + shard.size)
        return cls(here, torch.where(here, labels - shard.start, 0).long())

    def take_from_(self, logits: Float[Tensor, "tokens shard"]) -> Float32[Tensor, "tokens"]:
        """The target's logits, 0 where they are elsewhere; in their place the lowest number, whose exponential is 0."""
        index = self.column[:, None]
        found = logits.gather(1, index)
        logits.scatter_(1, index, found.masked_fill(self.here[:, None], torch.finfo(logits.dtype).min))
        return torch.where(self.here, found[:, 0].float(), 0.0)


@dataclass(frozen=True)
class Softmax:
    """What all shards know of each token, after the exchange."""

    logp: Float32[Tensor, "tokens"]
    entropy: Float32[Tensor, "tokens"]
    highest: Float32[
        Tensor, "tokens"
    ]  # M and log S apart: as one number, of the logits' size, they lose digits
    log_sum: Float32[Tensor, "tokens"]
    others: Float32[Tensor, "tokens"]  # 1 - p_y

    @classmethod
    def merged(cls, numbers: Float32[Tensor, "ranks 4 tokens"]) -> "Softmax":
        """From every shard's four numbers."""
        maxima, sums, products, targets = numbers.unbind(1)
        target = targets.sum(0)
        highest = torch.maximum(maxima.amax(0), target)
        above, below = target - highest, maxima - highest
        scale, target_share = below.exp(), above.exp()
        others = (sums * scale).sum(0)
        total = target_share + others
        log_sum = torch.where(above == 0, others.log1p(), total.log())
        mean = (((products + below * sums) * scale).sum(0) + target_share * above) / total
        return cls(above - log_sum, log_sum - mean, highest, log_sum, others / total)

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> "Softmax":
        """Of a whole call, to be put together chunk by chunk."""
        return cls(*torch.zeros(5, num_tokens, device=device))

    def put_(self, tokens: Tokens, part: "Softmax") -> None:
        """Fills in some of the tokens."""
        for name, vector in vars(self).items():
            vector[tokens] = getattr(part, name)

    def take(self, tokens: Tokens) -> "Softmax":
        """Some of the tokens."""
        return Softmax(*(vector[tokens] for vector in vars(self).values()))


@dataclass(frozen=True)
class ShardExponentials:
    """E = exp(z - offset), this shard's columns, 0 at the target."""

    exponentials: Float[Tensor, "tokens shard"]
    offset: Float32[Tensor, "tokens"]
    target: Target


def start_softmax(
    logits: Float[Tensor, "tokens shard"],
    target: Target,
    group: Group,
    target_logits: Float32[Tensor, "tokens"] | None = None,
) -> tuple[ShardExponentials, Pending]:
    """Turns the shard's logits into exponentials, in place, and sends the four numbers on their way.

    target_logits: more exact than those of the buffer, where that is in half precision.
    """
    numbers = logits.new_zeros(4, len(logits), dtype=torch.float32)
    if logits.shape[1] == 0:
        numbers[0] = torch.finfo(torch.float32).min  # finite, so that 0 * (m - M) is 0
    else:
        numbers[3] = target.take_from_(logits)
        if target_logits is not None:
            numbers[3] = torch.where(target.here, target_logits, 0.0)
        exponentiate_(logits, numbers[:3])
    return ShardExponentials(logits, numbers[0], target), start_all_gather(numbers, group)


def repeat_softmax(
    logits: Float[Tensor, "tokens shard"], target: Target, softmax: Softmax
) -> ShardExponentials:
    """The same in a second sweep, where the highest logit of all shards is known."""
    if logits.shape[1] > 0:
        target.take_from_(logits)
        exponentiate_at_(logits, softmax.highest)
    return ShardExponentials(logits, softmax.highest, target)
