"""The clipped objective: values worked out by hand, the limits of its clips, and masked infinities."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.algorithm.policy_loss import BehaveWeight, TokenLoss, decoupled_loss, sequence_loss
from megatron_a3po.algorithm.proximal import interpolate

CLIP: dict[str, Any] = {"eps_low": 0.2, "eps_high": 0.2}


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_ratios(
    ratios: torch.Tensor, weights: torch.Tensor, advantages: torch.Tensor, **options: Any
) -> TokenLoss:
    """The loss of tokens with these r, w and A (behaviour log-prob 0)."""
    prox_logp = weights.log()
    return decoupled_loss(
        prox_logp + ratios.log(), prox_logp, torch.zeros_like(ratios), advantages, **CLIP | options
    )


def test_values_by_hand():
    ratios, weights = vector(1.0, 1.5, 1.5, 0.5, 0.5), vector(1.0, 2.0, 2.0, 0.5, 0.5)
    found = of_ratios(ratios, weights, vector(2.0, 1.0, -1.0, 1.0, -1.0))
    # w * min(r A, clip(r) A):     1*2    2*1.2  2*-1.5  .5*.5  .5*-.8
    torch.testing.assert_close(found.loss, vector(-2.0, -2.4, 3.0, -0.25, 0.4))
    assert found.clipped.tolist() == [False, True, False, False, True]
    torch.testing.assert_close(found.importance_weight, ratios)
    torch.testing.assert_close(found.behave_imp_weight, weights)


def test_the_two_sides_of_the_clip_have_their_own_width():
    found = of_ratios(vector(1.4, 0.6), vector(1, 1), vector(1, -1), eps_low=0.3, eps_high=0.25)
    torch.testing.assert_close(found.loss, vector(-1.25, 0.7))


def test_zero_advantage_is_never_clipped():
    found = of_ratios(vector(9.0, 0.1), vector(1, 1), vector(0, 0))
    assert found.loss.abs().tolist() == [0, 0]
    assert found.clipped.tolist() == [False, False]


def test_dual_clip_floors_negative_advantages_only():
    ratios, weights, advantages = (
        vector(4.0, 4.0, 2.0, 0.5),
        vector(2.0, 2.0, 2.0, 2.0),
        vector(-1, 1, -1, -1),
    )
    found = of_ratios(ratios, weights, advantages, dual_clip=3.0)
    # A < 0: max(min(r A, clip(r) A), c A) with c A = -3: the first is floored, the third and fourth are not
    torch.testing.assert_close(found.loss, vector(6.0, -2.4, 4.0, 1.6))
    assert found.clipped.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("behave_weight", "losses"),
    [("clamp", (-5.0, -4.9, -0.5)), ("mask", (0.0, -4.9, -0.5)), ("off", (-1.0, -1.0, -1.0))],
)
def test_the_behaviour_weights_cap(behave_weight: str, losses: tuple[float, ...]):
    weights = vector(7.0, 4.9, 0.5)
    found = of_ratios(vector(1, 1, 1), weights, vector(1, 1, 1), behave_weight=behave_weight)
    torch.testing.assert_close(found.loss, vector(*losses))
    torch.testing.assert_close(found.behave_imp_weight, weights)  # reported before the cap


def test_the_cap_can_be_moved():
    found = of_ratios(vector(1.0), vector(7.0), vector(1.0), behave_weight_cap=6.0)
    torch.testing.assert_close(found.loss, vector(-6.0))


@given(
    logps=st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=8),
    staleness=st.integers(0, 9),
    advantage=st.floats(-3, 3),
)
def test_coupled_is_bitwise_decoupled_with_the_rollout_anchor(logps: list, staleness: int, advantage: float):
    behave, logp = torch.tensor(logps, dtype=torch.float32).unbind(1)
    advantages = torch.full_like(logp, advantage)
    anchor = interpolate(behave, logp, torch.full(logp.shape, staleness), "rollout")
    decoupled = decoupled_loss(logp, anchor, behave, advantages, **CLIP)
    ratio = torch.exp(logp - behave)  # standard PPO, written out
    coupled = -torch.minimum(ratio * advantages, ratio.clamp(1 - 0.2, 1 + 0.2) * advantages)
    assert torch.equal(decoupled.loss, coupled)
    assert torch.equal(decoupled.behave_imp_weight, torch.ones_like(logp))


@given(x=st.floats(-12, 12), staleness=st.integers(1, 12))
def test_the_loglinear_trust_region_is_the_clip_to_the_power_of_the_staleness(x: float, staleness: int):
    behave, logp = vector(0.0), vector(x)
    anchor = interpolate(behave, logp, torch.tensor([staleness]), "loglinear")
    low, high = staleness * math.log(0.8), staleness * math.log(1.2)
    if min(abs(x - low), abs(x - high)) > 1e-6:
        for sign, outside in ((1.0, x > high), (-1.0, x < low)):
            assert decoupled_loss(logp, anchor, behave, vector(sign), **CLIP).clipped.item() == outside


@given(x=st.floats(-5, 13), staleness=st.integers(6, 60))
def test_linears_upper_clip_never_fires_from_six_steps_on(x: float, staleness: int):
    anchor = interpolate(vector(0.0), vector(x), torch.tensor([staleness]), "linear")
    found = decoupled_loss(vector(x), anchor, vector(0.0), vector(1.0), **CLIP)
    assert not found.clipped.item()
    assert found.importance_weight.item() < staleness / (staleness - 1)


def test_linears_upper_clip_still_fires_at_five_steps():
    anchor = interpolate(vector(0.0), vector(6.0), torch.tensor([5]), "linear")
    assert decoupled_loss(vector(6.0), anchor, vector(0.0), vector(1.0), **CLIP).clipped.item()


def test_infinities_on_masked_positions_reach_neither_loss_nor_gradient():
    bad = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -1.0])
    mask = torch.tensor([False, False, False, True, True])
    for field in range(4):
        fields = [torch.tensor([-1.0, -1.0, -1.0, -2.0, -3.0]) for _ in range(4)]
        fields[field] = bad
        logp = fields[0].requires_grad_()
        found = decoupled_loss(logp, *fields[1:], **CLIP, mask=mask)
        found.loss.sum().backward()
        assert found.loss[:3].abs().tolist() == [0, 0, 0]
        assert logp.grad is not None
        assert logp.grad[:3].abs().tolist() == [0, 0, 0]
        assert found.loss.isfinite().all()
        assert logp.grad.isfinite().all()
        assert not found.clipped[:3].any()


def test_one_ratio_and_one_weight_per_sequence():
    logp, prox, behave = vector(-1.0, -2.0, -3.0), vector(-1.1, -1.8, -3.3), vector(-1.0, -2.0, -3.5)
    ids = torch.tensor([0, 0, 1])
    found = sequence_loss(logp, prox, behave, vector(1, 1, -1), ids, 2, **CLIP)
    # means of logp - prox: (0.1 - 0.2)/2, 0.3; of prox - behave: (-0.1 + 0.2)/2, 0.2
    r0, r1, w0, w1 = (math.exp(x) for x in (-0.05, 0.3, 0.05, 0.2))
    torch.testing.assert_close(found.importance_weight, vector(r0, r0, r1))
    torch.testing.assert_close(found.behave_imp_weight, vector(w0, w0, w1))
    torch.testing.assert_close(found.loss, vector(-w0 * r0, -w0 * r0, w1 * r1))
    assert found.clipped.tolist() == [False, False, False]


def test_a_sequence_is_clipped_as_a_whole():
    found = sequence_loss(
        vector(0.9, 0.1), vector(0, 0), vector(0, 0), vector(1, 1), torch.tensor([0, 0]), 1, **CLIP
    )
    assert found.clipped.tolist() == [True, True]
    torch.testing.assert_close(found.loss, vector(-1.2, -1.2))


def test_masked_tokens_do_not_count_in_a_sequences_mean():
    nothing = vector(0, 0, 0)
    mask = torch.tensor([True, False, True])
    logp = vector(0.1, math.inf, 0.05)
    ids = torch.tensor([0, 0, 0])
    found = sequence_loss(logp, nothing, nothing, vector(1, 1, 1), ids, 1, **CLIP, mask=mask)
    torch.testing.assert_close(
        found.importance_weight, torch.full((3,), math.exp(0.075), dtype=torch.float64)
    )
    assert found.loss[1].abs().item() == 0


@pytest.mark.parametrize("sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize(
    ("advantage", "behave_weight"), [(1.0, "clamp"), (0.0, "clamp"), (1.0, "mask"), (-1.0, "mask")]
)
def test_a_ratio_that_overflows_and_decides_nothing_has_no_gradient(
    advantage: float, behave_weight: BehaveWeight, sequence: bool
):
    """The sampler reported exp(-120): the clip holds the ratio, or the mask silences the token, whose weight is inf."""
    logp, behave = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-120.0, -1.0])
    prox = torch.tensor([-120.0, -1.0]) if behave_weight == "clamp" else torch.tensor([-100.0, -1.0])
    behave = behave if behave_weight == "clamp" else torch.tensor([-220.0, -1.0])
    advantages = torch.tensor([advantage, 1.0])
    clip: dict[str, Any] = {"eps_low": 0.2, "eps_high": 0.2, "behave_weight": behave_weight}
    if sequence:
        found = sequence_loss(logp, prox, behave, advantages, torch.tensor([0, 1]), 2, **clip)
    else:
        found = decoupled_loss(logp, prox, behave, advantages, **clip)
    assert found.importance_weight[0].isinf()
    expected = -1.2 * advantage if behave_weight == "clamp" else 0.0
    assert found.loss.tolist() == pytest.approx([expected, -1.0])
    found.loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [0.0, -1.0]


def test_a_ratio_that_overflows_and_decides_stays_infinite():
    logp, behave = torch.tensor([-1.0], requires_grad=True), torch.tensor([-120.0])
    found = decoupled_loss(logp, behave, behave, torch.tensor([-1.0]), eps_low=0.2, eps_high=0.2)
    assert found.loss.item() == float("inf")
