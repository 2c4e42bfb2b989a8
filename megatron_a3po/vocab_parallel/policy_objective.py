"""The objectives of a training run: an anchor, chosen once at start-up, and the clipped loss around it.

    where the proximal log-prob comes from          forwards it costs
    rollout_anchor      the behaviour log-prob      none       standard PPO/GRPO, the coupled loss
    own_anchor          stop-gradient of its own    none       first mini-batch: every ratio is exactly 1
    recomputed_anchor   TokenFields.prox_logp       one        mini-batches 2..n of `recompute`
    interpolated(...)   A-3PO's approximation       none       loglinear, linear

Next: `loss`, the layer that calls an objective chunk by chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from megatron_a3po.algorithm.policy_loss import BehaveWeight, TokenLoss, decoupled_loss
from megatron_a3po.algorithm.proximal import Method, interpolate
from megatron_a3po.vocab_parallel.token_fields import TokenFields

Anchor = Callable[[Float[Tensor, "tokens"], TokenFields], Float[Tensor, "tokens"]]


def rollout_anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """log pi_prox = log pi_behave."""
    return fields.behave_logp


def own_anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """log pi_prox = stop_gradient(log pi_theta): what recomputing gives before the first optimizer step."""
    return logp.detach()


def recomputed_anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """log pi_prox as the forward-only pass of this step computed it."""
    assert fields.prox_logp is not None, "the recomputed anchor needs TokenFields.prox_logp"
    return fields.prox_logp


def interpolated(method: Method) -> Anchor:
    """log pi_prox between behaviour and target by each token's staleness."""

    def anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
        return interpolate(fields.behave_logp, logp, fields.staleness, method)

    return anchor


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped policy loss around an anchor; an `Objective`."""

    anchor: Anchor
    eps_low: float
    eps_high: float
    dual_clip: float | None = None
    behave_weight: BehaveWeight = "clamp"
    behave_weight_cap: float = 5.0

    def token_loss(self, logp: Float[Tensor, "tokens"], fields: TokenFields) -> TokenLoss:
        """Loss, ratio, weight and clip of each token, before the loss weights."""
        return decoupled_loss(
            logp,
            self.anchor(logp, fields),
            fields.behave_logp,
            fields.advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            dual_clip=self.dual_clip,
            behave_weight=self.behave_weight,
            behave_weight_cap=self.behave_weight_cap,
        )

    def __call__(self, logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
        return self.token_loss(logp, fields).loss * fields.loss_weights


def supervised_objective(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """Cross-entropy, for the warm start: loss_t = -logp_t."""
    return -logp * fields.loss_weights
