"""Where a call's gradients come together, chunk by chunk: the hidden states' and the weight's.

    hidden    row_factor * (E @ weight) + target_value * weight[label]        summed over shards, by the exchange
    weight    E.T @ (row_factor * rows), and target_value * row added at its label

The first product may run before its factors are known, and its sum over the shards travels while the second runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megatron_a3po.vocab_parallel.logits_gradient import LogitsGradient
from megatron_a3po.vocab_parallel.products import add_weight_gradient_, multiply_weight
from megatron_a3po.vocab_parallel.shard_softmax import ShardExponentials
from megatron_a3po.vocab_parallel.sweep import Chunk

# Tokens corrected at a time, so that no third buffer of the rows' size comes up.
PART_TOKENS = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class WeightTotal:
    """Where the weight's gradient is summed: Megatron-Core's main gradient, else a float32 buffer of our own."""

    weight: Float[Tensor, "shard hidden"]
    total: Float[Tensor, "shard hidden"]
    in_main_grad: bool

    @classmethod
    def of(cls, weight: Float[Tensor, "shard hidden"]) -> "WeightTotal":
        """The main gradient where the weight has one."""
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is not None:
            return cls(weight, main_grad, True)
        return cls(weight, torch.zeros_like(weight, dtype=torch.float32), False)

    def hand_out(self, upstream: Float[Tensor, ""] | None) -> Float[Tensor, "shard hidden"]:
        """What backward returns; `upstream` scales a buffer of our own, where it is not in the sum already.

        For a main gradient it is a placeholder. Megatron-Core's hooks assert that there is a gradient, and drop it;
        but where the weight is tied to an embedding on the same stage they add it up with the embedding's own, so
        there it must be zeros.
        """
        if not self.in_main_grad:
            scaled = self.total if upstream is None else self.total.mul_(upstream)
            return scaled.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
        tied = getattr(self.weight, "zero_out_wgrad", False)
        return torch.zeros_like(self.weight) if tied else torch.empty_like(self.weight)


@dataclass(frozen=True)
class Gradients:
    """The gradients that are wanted of one call."""

    weight: Float[Tensor, "shard hidden"]  # true columns of the vocabulary only
    weight_total: WeightTotal | None
    want_hidden: bool

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.want_hidden or self.weight_total is not None

    def start_hidden(self, shard: ShardExponentials) -> Float32[Tensor, "tokens hidden"] | None:
        """E @ weight, which needs no factor yet."""
        return multiply_weight(shard.exponentials, self.weight) if self.want_hidden else None

    def add(
        self,
        chunk: Chunk,
        shard: ShardExponentials,
        gradient: LogitsGradient,
        product: Float32[Tensor, "tokens hidden"] | None = None,
    ) -> None:
        """Adds the chunk's share of both; `product` is `start_hidden`'s where it ran ahead."""
        if self.want_hidden:
            product = self.start_hidden(shard) if product is None else product
            assert product is not None
            self._return_hidden(chunk, shard, gradient, product)
        if self.weight_total is not None and len(self.weight):
            self._add_weight(self.weight_total.total[: len(self.weight)], chunk, shard, gradient)

    def _return_hidden(
        self, chunk: Chunk, shard: ShardExponentials, gradient: LogitsGradient, product: Tensor
    ) -> None:
        product.mul_(gradient.row_factor[:, None])
        for part in _parts(product) if len(self.weight) else ():
            target = self.weight[shard.target.column[part]]
            product[part].addcmul_(target, gradient.target_value[part, None])
        chunk.start_return(product)

    def _add_weight(
        self, total: Tensor, chunk: Chunk, shard: ShardExponentials, gradient: LogitsGradient
    ) -> None:
        rows = chunk.projection.rows
        for part in _parts(rows):
            correction = (rows[part] * gradient.target_value[part, None]).to(total.dtype)
            # Of equal labels a GPU, too, adds up in a fixed order.
            total.index_put_((shard.target.column[part],), correction, accumulate=True)
        # The rows are the chunk's own copy, and nobody reads them after this.
        add_weight_gradient_(total, shard.exponentials, rows.mul_(gradient.row_factor[:, None]))


def _parts(rows: Tensor) -> Iterator[slice]:
    size = PART_TOKENS[rows.device.type]
    return (slice(start, start + size) for start in range(0, len(rows), size))
