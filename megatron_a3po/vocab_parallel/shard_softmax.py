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
run while the four numbers travel. All of z is after the temperature here. Next: `logits_gradient`, the factors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group, Pending, group_rank, start_all_gather
from megatron_a3po.vocab_parallel.exponentials import exponentiate_, exponentiate_at_
from megatron_a3po.vocab_parallel.projection import Projection
from megatron_a3po.vocab_parallel.token_fields import Tokens

# In place of logits that are not to count: its exponential is 0, and no temperature makes an infinity of it.
FAR_BELOW = -1e30


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

    def take_from_(self, logits: Float32[Tensor, "part shard"], part: slice) -> Float32[Tensor, "part"]:
        """The target's logits of some tokens, 0 where they are elsewhere; in their place `FAR_BELOW`."""
        index, here = self.column[part, None], self.here[part]
        found = logits.gather(1, index)
        logits.scatter_(1, index, found.masked_fill(here[:, None], FAR_BELOW))
        return torch.where(here, found[:, 0], 0.0)


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
    scale: Float32[Tensor, "tokens"] | None  # 1 / temperature, which is in z


def start_softmax(projection: Projection, target: Target, group: Group) -> tuple[ShardExponentials, Pending]:
    """Makes the shard's logits and their exponentials, and sends the four numbers on their way."""
    exponentials, scale = projection.exponentials, projection.scale
    numbers = torch.zeros(4, len(exponentials), device=exponentials.device)
    if exponentials.shape[1] == 0:
        numbers[0] = FAR_BELOW  # finite, so that 0 * (m - M) is 0
    else:
        for part, logits in projection.parts():
            numbers[3, part] = target.take_from_(logits, part)
            exponentiate_(logits, exponentials[part], numbers[:3, part], projection.scale_of(part))
        if scale is not None:
            numbers[3] *= scale
    return ShardExponentials(exponentials, numbers[0], target, scale), start_all_gather(numbers, group)


def repeat_softmax(projection: Projection, target: Target, softmax: Softmax) -> ShardExponentials:
    """The same in a second sweep, where the highest logit of all shards is known."""
    exponentials, scale = projection.exponentials, projection.scale
    if exponentials.shape[1] > 0:
        for part, logits in projection.parts():
            target.take_from_(logits, part)
            exponentiate_at_(logits, exponentials[part], softmax.highest[part], projection.scale_of(part))
    return ShardExponentials(exponentials, softmax.highest, target, scale)
