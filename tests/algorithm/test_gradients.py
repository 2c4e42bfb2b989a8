"""Gradients: what flows, and what must not.

Finite differences see through a detach, so gradcheck runs with anchor and weight frozen at the base point; the real
gradient must equal the frozen one, and differ from the one of an anchor that was not detached.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_a3po.algorithm.policy_loss import decoupled_loss, sequence_loss
from megatron_a3po.algorithm.proximal import Method, interpolate

CLIP: dict[str, Any] = {"eps_low": 0.2, "eps_high": 0.2}
# Away from kinks: ratios inside and outside of the clip on both sides, both signs of the advantage. With d = 3 the
# loglinear ratio is exp((logp - behave) / 3): clipped where |logp - behave| > 0.6 or so, in the advantage's direction.
BEHAVE = torch.tensor([-1.0, -2.0, -1.5, -3.0, -2.0, -1.0], dtype=torch.float64)
LOGP = BEHAVE + torch.tensor([0.1, 1.2, 1.2, -1.5, -1.5, -0.2], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, -0.5], dtype=torch.float64)
STALENESS = torch.tensor([3, 3, 3, 3, 3, 0])
CLIPPED = [False, True, False, False, True, False]
SEQUENCES = torch.tensor([0, 0, 1, 1, 1, 2])
ANCHORS: list[Method] = ["loglinear", "linear", "rollout"]


def attached_anchor(logp: Tensor, method: str) -> Tensor:
    """The anchor as it would be without the detach: what a mistaken implementation differentiates."""
    alpha = 1 / STALENESS.clamp(min=1).double()
    match method:
        case "loglinear":
            mixed = alpha * BEHAVE + (1 - alpha) * logp
        case "linear":
            mixed = torch.log(alpha * BEHAVE.exp() + (1 - alpha) * logp.exp())
        case _:
            mixed = BEHAVE
    return torch.where(STALENESS <= 1, BEHAVE, mixed)


def attached_losses(logp: Tensor, method: str) -> Tensor:
    anchor = attached_anchor(logp, method)
    ratio, weight = torch.exp(logp - anchor), torch.exp(anchor - BEHAVE)
    return -weight * torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES)


def losses(logp: Tensor, anchor: Tensor, **options: Any) -> Tensor:
    return decoupled_loss(logp, anchor, BEHAVE, ADVANTAGES, **CLIP | options).loss


def sequence_losses(logp: Tensor, anchor: Tensor, **options: Any) -> Tensor:
    return sequence_loss(logp, anchor, BEHAVE, ADVANTAGES, SEQUENCES, 3, **CLIP | options).loss


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    logp = LOGP.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(logp).sum(), logp)
    return found


@pytest.mark.parametrize("method", ANCHORS)
@pytest.mark.parametrize("form", [losses, sequence_losses])
@pytest.mark.parametrize(
    "options", [{}, {"dual_clip": 1.5}, {"behave_weight": "mask", "behave_weight_cap": 1.2}]
)
def test_gradcheck_with_anchor_and_weight_frozen(method: Method, form: Callable, options: dict):
    frozen = interpolate(BEHAVE, LOGP, STALENESS, method)
    torch.autograd.gradcheck(lambda logp: form(logp, frozen, **options), LOGP.clone().requires_grad_())


@pytest.mark.parametrize("method", ["loglinear", "linear"])
def test_the_real_gradient_is_the_frozen_one_and_not_the_attached_one(method: Method):
    frozen = interpolate(BEHAVE, LOGP, STALENESS, method)
    real = gradient(lambda logp: losses(logp, interpolate(BEHAVE, logp, STALENESS, method)))
    assert torch.equal(real, gradient(lambda logp: losses(logp, frozen)))

    attached = gradient(lambda logp: attached_losses(logp, method))
    clipped = decoupled_loss(LOGP, frozen, BEHAVE, ADVANTAGES, **CLIP).clipped
    assert clipped.tolist() == CLIPPED
    assert real[clipped].tolist() == [0, 0]  # a clipped token is silent
    assert (attached[clipped].abs() > 0.05).all()  # with an attached anchor its weight would pull
    # Unclipped, w r = x whatever the anchor: there the next test tells the two apart, without the weight.
    torch.testing.assert_close(attached[~clipped], real[~clipped])


def test_the_ratios_derivative_is_the_ratio_not_its_share():
    """r = x^alpha, but dr/dlogp = r, not alpha r: the anchor stands still. Seen with the weight switched off."""
    anchor = interpolate(BEHAVE, LOGP, STALENESS, "loglinear")
    real = gradient(
        lambda logp: losses(logp, interpolate(BEHAVE, logp, STALENESS, "loglinear"), behave_weight="off")
    )
    expected = -torch.exp(LOGP - anchor) * ADVANTAGES
    unclipped = ~torch.tensor(CLIPPED)
    torch.testing.assert_close(real[unclipped], expected[unclipped])
    shared = gradient(lambda logp: -torch.exp(logp - attached_anchor(logp, "loglinear")) * ADVANTAGES)
    stale = unclipped & (STALENESS > 1)
    torch.testing.assert_close(shared[stale] * 3, real[stale])


def test_unclipped_the_gradient_is_the_importance_weighted_policy_gradient():
    real = gradient(
        lambda logp: losses(logp, interpolate(BEHAVE, logp, STALENESS, "loglinear"), behave_weight_cap=99.0)
    )
    unclipped = ~torch.tensor(CLIPPED)
    torch.testing.assert_close(real[unclipped], (-torch.exp(LOGP - BEHAVE) * ADVANTAGES)[unclipped])


def test_a_token_masked_by_its_weight_is_silent():
    real = gradient(
        lambda logp: losses(
            logp,
            interpolate(BEHAVE, logp, STALENESS, "loglinear"),
            behave_weight="mask",
            behave_weight_cap=2.0,
        )
    )
    weight = torch.exp(interpolate(BEHAVE, LOGP, STALENESS, "loglinear") - BEHAVE)
    assert (weight > 2).any()
    assert (real[weight > 2] == 0).all()


def test_a_sequence_ratios_derivative_is_shared_by_its_tokens():
    """dr_i / dlogp_t = r_i / |y_i|, each token with its own staleness; the loss mean then divides once more."""
    anchor = interpolate(BEHAVE, LOGP, STALENESS, "loglinear")
    logp = LOGP.clone().requires_grad_()
    ratios = sequence_loss(
        logp, anchor, BEHAVE, ADVANTAGES, SEQUENCES, 3, eps_low=9.0, eps_high=9.0, behave_weight="off"
    )
    lengths = torch.tensor([2.0, 2.0, 3.0, 3.0, 3.0, 1.0])
    per_sequence = (ratios.loss / ADVANTAGES / lengths).sum()  # -(r_0 + r_1 + r_2)
    (found,) = torch.autograd.grad(per_sequence, logp)
    torch.testing.assert_close(found, -ratios.importance_weight / lengths)


def test_neither_anchor_nor_behaviour_nor_advantage_receives_gradient():
    logp, prox, behave = (x.clone().requires_grad_() for x in (LOGP, LOGP - 0.1, BEHAVE))
    found = decoupled_loss(logp, prox, behave, ADVANTAGES, **CLIP)
    assert not found.importance_weight.requires_grad
    assert not found.behave_imp_weight.requires_grad
    found.loss.sum().backward()
    assert [x.grad is not None for x in (logp, prox, behave)] == [True, False, False]
