"""The per-token numbers of a call as they come in: loss, its derivatives, log-prob, entropy."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from megatron_a3po.vocab_parallel.shard_softmax import Softmax
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields, Tokens


@dataclass(frozen=True)
class TokenLosses:
    """Vectors over the trained tokens."""

    losses: Float32[Tensor, "trained"]
    by_logp: Float32[Tensor, "trained"]  # dloss/dlogp
    logp: Float32[Tensor, "trained"]
    entropy: Float32[Tensor, "trained"]

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> "TokenLosses":
        """To be filled."""
        return cls(*torch.zeros(4, num_tokens, device=device))

    def evaluate_(
        self,
        tokens: Tokens,
        softmax: Softmax,
        objective: Objective,
        fields: TokenFields,
        entropy_coef: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Fills in `tokens`; returns the loss's derivatives by their log-probs and by their entropies."""
        chosen = fields.take(tokens)
        losses, by_logp = differentiate(objective, softmax.logp, chosen)
        by_entropy = None
        if entropy_coef != 0:
            by_entropy = -entropy_coef * chosen.loss_weights.float()
            losses = losses + by_entropy * softmax.entropy
        self.losses[tokens], self.by_logp[tokens] = losses, by_logp
        self.logp[tokens], self.entropy[tokens] = softmax.logp, softmax.entropy
        return by_logp, by_entropy

    def outputs(self, ctx: Any) -> tuple[Tensor, ...]:
        """What an autograd function of the layer returns: the loss, and three without gradient."""
        first = first_nonfinite(self.losses, self.logp, self.by_logp)
        outputs = self.losses.sum(), self.logp, self.entropy, first
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs


def differentiate(
    objective: Objective, logp: Float32[Tensor, "tokens"], fields: TokenFields
) -> tuple[Float32[Tensor, "tokens"], Float32[Tensor, "tokens"]]:
    """The objective at each token and its derivative by the log-probs: the only autograd there is."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        losses = objective(logp, fields)
        (derivative,) = torch.autograd.grad(losses.sum(), logp)
    return losses.detach(), derivative


def first_nonfinite(*vectors: Float32[Tensor, "trained"]) -> Int64[Tensor, ""]:
    """Index of the first token with a non-finite value in any vector, -1 for none; stays on the device."""
    finite = torch.stack(vectors).isfinite().all(0)
    num_tokens = finite.shape[0]
    positions = torch.arange(num_tokens, device=finite.device)
    padded = torch.cat([torch.where(finite, num_tokens, positions), positions.new_full((1,), num_tokens)])
    first = padded.amin()
    return torch.where(first == num_tokens, -1, first)
