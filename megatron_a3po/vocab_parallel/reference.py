"""The loss layer's plain twin: the whole vocabulary, dense logits, autograd, one process.

What the layer must agree with, in the dtype of its inputs (float64 in the tests). Never used in training.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields


def reference_loss(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    trained: Int[Tensor, "trained"],
    fields: TokenFields,
    objective: Objective,
    temperature: float | Float[Tensor, "trained"] = 1.0,
    entropy_coef: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "trained"], Float[Tensor, "trained"]]:
    """(summed loss, log-probs, entropies) of the rows `trained`; differentiable by plain autograd."""
    divisor = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logp_all = torch.log_softmax(hidden[trained] @ weight.T / divisor, dim=-1)
    logp = logp_all.gather(1, fields.labels[:, None])[:, 0]
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    loss = objective(logp, fields).sum() - entropy_coef * (fields.loss_weights * entropy).sum()
    return loss, logp.detach(), entropy.detach()
