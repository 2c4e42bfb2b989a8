"""Every objective's gradient: finite differences with anchor and weight frozen at the base point, and the real one,
whose anchor is made from the log-prob it is differentiated by, equal to it to the bit.

What an anchor that was not detached would give instead is in tests/algorithm/test_gradients.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_a3po.vocab_parallel import TokenFields
from megatron_a3po.vocab_parallel.policy_objective import (
    Anchor,
    ClippedObjective,
    PolicyObjective,
    SequenceObjective,
    interpolated,
    own_anchor,
    recomputed_anchor,
    rollout_anchor,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Ratios inside and outside of the clip on both sides for each sign of the advantage, per token and per sequence, and
# none near 0.8, 1.2 or the dual clip's 1.25.
BEHAVE = vector(-1.0, -2.0, -1.5, -3.0, -2.0, -1.0)
LOGP = BEHAVE + vector(0.1, 1.2, 1.2, -1.5, -1.5, -0.2)
FIELDS = TokenFields(
    labels=torch.zeros(6, dtype=torch.int64),
    behave_logp=BEHAVE,
    staleness=torch.tensor([3, 3, 3, 3, 3, 0]),
    advantages=vector(1.0, 1.0, -1.0, 1.0, -1.0, -0.5),
    loss_weights=vector(0.5, 0.5, 1 / 3, 1 / 3, 1 / 3, 1.0),
    prox_logp=LOGP - vector(0.05, 0.45, 0.45, -0.5, -0.5, -0.1),
    reference_logp=LOGP + vector(0.3, -0.2, 0.1, -0.4, 0.0, 0.2),
    sequence_ids=torch.tensor([0, 0, 1, 1, 1, 2]),
    num_sequences=3,
)
ANCHORS: dict[str, Anchor] = {
    "coupled": rollout_anchor,
    "own": own_anchor,
    "recomputed": recomputed_anchor,
    "loglinear": interpolated("loglinear"),
    "linear": interpolated("linear"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "weight capped": {"behave_weight_cap": 1.1},
    "weight masked": {"behave_weight": "mask", "behave_weight_cap": 1.1},
    "weight off": {"behave_weight": "off"},
    "dual clip": {"dual_clip": 1.25},
    "near a reference": {"kl_coef": 0.1},
}
anchors = pytest.mark.parametrize("anchor", ANCHORS)
forms = pytest.mark.parametrize("form", [PolicyObjective, SequenceObjective])
options = pytest.mark.parametrize("option", OPTIONS)


def objective_of(form: type[ClippedObjective], anchor: Anchor, **changes: Any) -> ClippedObjective:
    return form(anchor, eps_low=0.2, eps_high=0.2, **changes)


def frozen(anchor: str) -> Anchor:
    """The anchor at the base point, wherever the objective is evaluated; the weight follows from it."""
    there = ANCHORS[anchor](LOGP, FIELDS)
    return lambda logp, fields: there


def gradient(objective: ClippedObjective) -> Tensor:
    logp = LOGP.clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(logp, FIELDS).sum(), logp)
    return found


@options
@forms
@anchors
def test_gradcheck_with_anchor_and_weight_frozen(anchor: str, form: type[ClippedObjective], option: str):
    objective = objective_of(form, frozen(anchor), **OPTIONS[option])
    assert torch.autograd.gradcheck(lambda logp: objective(logp, FIELDS), LOGP.clone().requires_grad_())


@options
@forms
@anchors
def test_the_real_gradient_is_the_frozen_one(anchor: str, form: type[ClippedObjective], option: str):
    real = gradient(objective_of(form, ANCHORS[anchor], **OPTIONS[option]))
    assert torch.equal(real, gradient(objective_of(form, frozen(anchor), **OPTIONS[option])))
    assert real.isfinite().all()


@pytest.mark.parametrize("anchor", ["coupled", "recomputed", "loglinear", "linear"])
def test_options_and_ratios_are_at_work_at_the_base_point(anchor: str):
    """Else the checks above would compare one function with itself."""
    token = objective_of(PolicyObjective, ANCHORS[anchor])
    assert token.token_loss(LOGP, FIELDS).clipped.any()
    assert not token.token_loss(LOGP, FIELDS).clipped.all()
    plain = gradient(objective_of(PolicyObjective, ANCHORS[anchor], behave_weight_cap=99.0))
    changed = {
        name: gradient(objective_of(PolicyObjective, ANCHORS[anchor], **OPTIONS[name])) for name in OPTIONS
    }
    weighted = anchor != "coupled"  # there the weight is 1
    for name, found in changed.items():
        assert torch.equal(found, plain) != (weighted or not name.startswith("weight")), name
    sequence = gradient(objective_of(SequenceObjective, ANCHORS[anchor], behave_weight_cap=99.0))
    assert not torch.allclose(sequence, plain)


@forms
def test_the_own_anchors_gradient_by_hand(form: type[ClippedObjective]):
    """r = 1, so dloss/dlogp = -w A, times the loss weight; a sequence's is shared by its tokens."""
    real = gradient(objective_of(form, own_anchor, behave_weight_cap=99.0))
    pulls = -FIELDS.advantages * FIELDS.loss_weights
    if form is PolicyObjective:
        expected = torch.exp(LOGP - BEHAVE) * pulls
    else:
        parts = [slice(0, 2), slice(2, 5), slice(5, 6)]
        means = [((LOGP - BEHAVE)[p].mean().exp() * pulls[p].sum() / (p.stop - p.start)) for p in parts]
        expected = torch.stack([means[i] for i in FIELDS.sequence_ids.tolist()])  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(real, expected)


@forms
def test_a_reference_pulls_by_one_minus_the_ratio_to_it(form: type[ClippedObjective]):
    """d k3 / d logp = 1 - pi_ref / pi_theta."""
    objective = objective_of(form, own_anchor, kl_coef=0.1)
    term = gradient(objective) - gradient(replace(objective, kl_coef=0.0))
    assert FIELDS.reference_logp is not None
    expected = 0.1 * (1 - torch.exp(FIELDS.reference_logp - LOGP)) * FIELDS.loss_weights
    torch.testing.assert_close(term, expected)
