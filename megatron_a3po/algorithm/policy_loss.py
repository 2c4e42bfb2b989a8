"""The decoupled clipped objective, per token: the three lines everything else in this repository serves.

    r = pi_theta / pi_prox                 what is clipped, and what carries the gradient
    w = pi_prox / pi_behave                what corrects for stale samples; detached, capped
    loss = -w * min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A)

With pi_prox = pi_behave this *is* standard PPO (w is exactly 1): the coupled loss needs no code of its own.
How per-token losses become one number is `loss_mean`'s business, where the anchor comes from `proximal`'s.

    closed form with the loglinear anchor, x = pi_theta / pi_behave, m = max(d, 1):
    r = x^(1/m),  w * r = x,  trust region in x: [(1 - eps_low)^m, (1 + eps_high)^m]
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BehaveWeight = Literal["clamp", "mask", "off"]
LARGE_LOG_RATIO = 60.0  # a ratio of 1e26: over every clip, and finite times any advantage


@dataclass(frozen=True)
class TokenLoss:
    """What one token contributes: its loss (with gradient) and what was measured on the way (without)."""

    loss: Float[Tensor, "tokens"]
    importance_weight: Float[Tensor, "tokens"]  # r, before the clip
    behave_imp_weight: Float[Tensor, "tokens"]  # w, before the cap
    clipped: Bool[Tensor, "tokens"]  # the clip decides: clip(r) * A < r * A, strictly


def decoupled_loss(
    logp: Float[Tensor, "tokens"],
    prox_logp: Float[Tensor, "tokens"],
    behave_logp: Float[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
    behave_weight: BehaveWeight = "clamp",
    behave_weight_cap: float = 5.0,
    mask: Bool[Tensor, "tokens"] | None = None,
) -> TokenLoss:
    """loss_t = -w_t * min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t), one value per token.

    Gradient flows through `logp` alone. `mask` is for callers who keep untrained tokens: their fields are
    replaced before any exponential, so an infinity there neither raises nor poisons a gradient, and their
    loss is 0. Source: decoupled PPO (Hilton et al. 2022, eq. 4); A-3PO, eq. 2.
    """
    logp, prox_logp, behave_logp, advantages = _trained(mask, logp, prox_logp, behave_logp, advantages)
    weight = torch.exp(prox_logp - behave_logp).detach()
    silenced = _silenced(weight, behave_weight, behave_weight_cap)
    ratio, measured = _ratio(logp - prox_logp.detach(), advantages, silenced)
    objective, clipped = _clipped_objective(ratio, advantages, eps_low, eps_high, dual_clip)
    loss = _apply_weight(-objective, weight, silenced, behave_weight, behave_weight_cap)
    return TokenLoss(loss, measured, weight, clipped)


def sequence_loss(
    logp: Float[Tensor, "tokens"],
    prox_logp: Float[Tensor, "tokens"],
    behave_logp: Float[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    sequence_ids: Int[Tensor, "tokens"],
    num_sequences: int,
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
    behave_weight: BehaveWeight = "clamp",
    behave_weight_cap: float = 5.0,
    mask: Bool[Tensor, "tokens"] | None = None,
) -> TokenLoss:
    """The same objective with one ratio and one weight per sequence (GSPO), given back at each of its tokens.

        r_i = exp(mean_t(logp - prox_logp))             dr_i / dlogp_t = r_i / |y_i|
        w_i = exp(mean_t(prox_logp - behave_logp))

    Every token's anchor has its own staleness. With the `sequence` loss mean the sum over tokens is GSPO's
    mean over sequences. `sequence_ids` runs from 0 to num_sequences - 1. Source: GSPO (Zheng et al. 2025),
    eq. 5-7.
    """
    logp, prox_logp, behave_logp, advantages = _trained(mask, logp, prox_logp, behave_logp, advantages)
    counted = torch.ones_like(logp) if mask is None else mask.to(logp.dtype)

    def sequence_mean(values: Tensor) -> Tensor:
        zeros = values.new_zeros(num_sequences)
        lengths = zeros.index_add(0, sequence_ids, counted).clamp(min=1)
        return (zeros.index_add(0, sequence_ids, values * counted) / lengths)[sequence_ids]

    weight = torch.exp(sequence_mean(prox_logp - behave_logp)).detach()
    silenced = _silenced(weight, behave_weight, behave_weight_cap)
    ratio, measured = _ratio(sequence_mean(logp - prox_logp.detach()), advantages, silenced)
    objective, clipped = _clipped_objective(ratio, advantages, eps_low, eps_high, dual_clip)
    loss = _apply_weight(-objective, weight, silenced, behave_weight, behave_weight_cap)
    return TokenLoss(loss, measured, weight, clipped)


def _ratio(log_ratio: Tensor, advantages: Tensor, silenced: Tensor) -> tuple[Tensor, Tensor]:
    """exp(log_ratio), twice: for the loss, and as it is measured.

    For the loss an infinity that decides nothing, clipped or silenced, is a large number without gradient: its own
    would be 0 * inf. One that decides stays, to be found and skipped.
    """
    measured = log_ratio.detach().exp()
    decides_nothing = measured.isinf() & ((advantages >= 0) | silenced)
    return torch.exp(torch.where(decides_nothing, LARGE_LOG_RATIO, log_ratio)), measured


def _clipped_objective(
    ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), for A < 0 floored at c A by a dual clip (Ye et al. 2020); where the clip decides."""
    plain = ratio * advantages
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    objective = torch.minimum(plain, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return objective, (clipped < plain).detach()


def _silenced(weight: Tensor, behave_weight: BehaveWeight, cap: float) -> Tensor:
    """Tokens whose loss is 0: over the cap, where that is asked for."""
    return weight > cap if behave_weight == "mask" else torch.zeros_like(weight, dtype=torch.bool)


def _apply_weight(
    loss: Tensor, weight: Tensor, silenced: Tensor, behave_weight: BehaveWeight, cap: float
) -> Tensor:
    """w * loss with w capped (clamp), with the tokens over the cap silenced (mask), or without w (off)."""
    match behave_weight:
        case "clamp":
            return weight.clamp(max=cap) * loss
        case "mask":
            return torch.where(silenced, 0.0, weight) * loss  # before the product: 0 * inf is not 0
        case "off":
            return loss


def _trained(mask: Tensor | None, *fields: Tensor) -> tuple[Tensor, ...]:
    """The fields with 0 where the mask is False: replaced before arithmetic, not multiplied away after it."""
    return fields if mask is None else tuple(torch.where(mask, field, 0.0) for field in fields)
