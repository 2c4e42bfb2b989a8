"""The objectives of a training run: an anchor, chosen once at start-up, and the clipped loss around it.

    where the proximal log-prob comes from          forwards it costs
    rollout_anchor      the behaviour log-prob      none       standard PPO/GRPO, the coupled loss
    own_anchor          stop-gradient of its own    none       first mini-batch: every ratio is exactly 1
    recomputed_anchor   TokenFields.prox_logp       one        mini-batches 2..n of `recompute`
    interpolated(...)   A-3PO's approximation       none       loglinear, linear

`PolicyObjective` has a ratio per token; `SequenceObjective` one per sequence, and takes two sweeps. Both may hold the
policy near a frozen reference. Next: `loss`, the layer that calls an objective chunk by chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_a3po.algorithm.policy_loss import BehaveWeight, TokenLoss, decoupled_loss, sequence_loss
from megatron_a3po.algorithm.proximal import METHODS, Method, interpolate
from megatron_a3po.vocab_parallel.token_fields import TokenFields

BEHAVE_WEIGHTS: tuple[BehaveWeight, ...] = get_args(BehaveWeight)
Anchor = Callable[[Float[Tensor, "tokens"], TokenFields], Float[Tensor, "tokens"]]


def rollout_anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """log pi_prox = log pi_behave."""
    return fields.behave_logp


def own_anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """log pi_prox = stop_gradient(log pi_theta): what recomputing gives before the first optimizer step."""
    return logp.detach()


def recomputed_anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """log pi_prox as the forward-only pass of this step computed it."""
    if fields.prox_logp is None:
        raise ValueError("the recomputed anchor needs TokenFields.prox_logp, which is None")
    return fields.prox_logp


def interpolated(method: Method) -> Anchor:
    """log pi_prox between behaviour and target by each token's staleness."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")

    def anchor(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
        return interpolate(fields.behave_logp, logp, fields.staleness, method)

    return anchor


@dataclass(frozen=True)
class ClippedObjective(ABC):
    """The clipped policy loss around an anchor, times the loss weights; an `Objective`.

    kl_coef: adds kl_coef * k3 with k3 = exp(ref - logp) - 1 - (ref - logp) >= 0, of `TokenFields.reference_logp`; its
    mean under the target policy is KL(target || reference).
    """

    needs_all_tokens: ClassVar[bool]

    anchor: Anchor
    eps_low: float
    eps_high: float
    dual_clip: float | None = None
    behave_weight: BehaveWeight = "clamp"
    behave_weight_cap: float = 5.0
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.behave_weight not in BEHAVE_WEIGHTS:
            raise ValueError(
                f"behave_weight is {self.behave_weight!r}; it must be one of {', '.join(BEHAVE_WEIGHTS)}"
            )
        for name in ("eps_low", "eps_high", "behave_weight_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")

    @abstractmethod
    def token_loss(self, logp: Float[Tensor, "tokens"], fields: TokenFields) -> TokenLoss:
        """Loss, ratio, weight and clip of each token, before the loss weights and without the KL term."""

    def __call__(self, logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
        loss = self.token_loss(logp, fields).loss
        if self.kl_coef != 0:
            if fields.reference_logp is None:
                raise ValueError("a KL term needs TokenFields.reference_logp, which is None")
            log_ratio = fields.reference_logp - logp
            loss = loss + self.kl_coef * (torch.expm1(log_ratio) - log_ratio)
        return loss * fields.loss_weights

    def _clip_settings(self) -> dict[str, Any]:
        names = ("eps_low", "eps_high", "dual_clip", "behave_weight", "behave_weight_cap")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PolicyObjective(ClippedObjective):
    """One ratio per token: A-3PO, decoupled PPO, PPO, GRPO."""

    needs_all_tokens: ClassVar[bool] = False

    def token_loss(self, logp: Float[Tensor, "tokens"], fields: TokenFields) -> TokenLoss:
        anchor = self.anchor(logp, fields)
        return decoupled_loss(logp, anchor, fields.behave_logp, fields.advantages, **self._clip_settings())


@dataclass(frozen=True)
class SequenceObjective(ClippedObjective):
    """One ratio per sequence: GSPO. Whole sequences only, so not with context parallelism, and two sweeps."""

    needs_all_tokens: ClassVar[bool] = True

    def token_loss(self, logp: Float[Tensor, "tokens"], fields: TokenFields) -> TokenLoss:
        if fields.sequence_ids is None or fields.num_sequences < 1:
            raise ValueError(
                "a sequence-level ratio needs TokenFields.sequence_ids and num_sequences; found "
                f"{'no' if fields.sequence_ids is None else len(fields.sequence_ids)} ids and {fields.num_sequences}"
            )
        return sequence_loss(
            logp,
            self.anchor(logp, fields),
            fields.behave_logp,
            fields.advantages,
            fields.sequence_ids,
            fields.num_sequences,
            **self._clip_settings(),
        )


def supervised_objective(logp: Float[Tensor, "tokens"], fields: TokenFields) -> Float[Tensor, "tokens"]:
    """Cross-entropy, for the warm start: loss_t = -logp_t."""
    return -logp * fields.loss_weights
