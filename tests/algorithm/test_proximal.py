"""The proximal approximation: the specification's table, its identities, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.algorithm import approximate_proximal_logp
from megatron_a3po.algorithm.proximal import METHODS, Method, interpolate
from megatron_a3po.algorithm.staleness import behave_share, trained_staleness

VERSIONS = torch.tensor([-1, 0, 1, 2, 3, 4, 5], dtype=torch.int32)
BEHAVE, TARGET = torch.full((7,), -1.0, dtype=torch.float64), torch.full((7,), -2.0, dtype=torch.float64)
TABLE = {  # behave -1, target -2, current version 5, for the versions above; worked out by hand
    "loglinear": [-1, -1.8, -1.75, -1.6666667, -1.5, -1, -1],
    "linear": [-1, -1.7046055, -1.6426260, -1.5471676, -1.3798855, -1, -1],
    "rollout": [-1, -1, -1, -1, -1, -1, -1],
}

logps = st.floats(-20, 0)
stalenesses = st.integers(0, 100)


def prox(behave: float, target: float, staleness: int, method: Method) -> float:
    behave_logp, logp = (torch.tensor([x], dtype=torch.float64) for x in (behave, target))
    return interpolate(behave_logp, logp, torch.tensor([staleness]), method).item()


def test_the_behaviours_share_is_one_over_the_staleness_but_at_most_one():
    shares = behave_share(torch.tensor([0, 1, 2, 4, 100]), torch.float64)
    assert shares.tolist() == [1, 1, 0.5, 0.25, 0.01]


@pytest.mark.parametrize("method", METHODS)
def test_the_table(method: Method):
    found = approximate_proximal_logp(BEHAVE, TARGET, VERSIONS, 5, method)
    torch.testing.assert_close(found, torch.tensor(TABLE[method], dtype=torch.float64), atol=5e-8, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_any_shape_and_no_gradient(method: Method):
    behave = BEHAVE[1:].view(2, 3).requires_grad_()
    target = TARGET[1:].view(2, 3).clone().requires_grad_()
    found = approximate_proximal_logp(behave, target, VERSIONS[1:].view(2, 3), 5, method)
    assert found.shape == (2, 3)
    assert not found.requires_grad


@given(behave=logps, target=logps, staleness=stalenesses, method=st.sampled_from(METHODS))
def test_the_anchor_lies_between_behaviour_and_target(
    behave: float, target: float, staleness: int, method: Method
):
    low, high = sorted([behave, target])
    assert low - 1e-12 <= prox(behave, target, staleness, method) <= high + 1e-12


@given(behave=logps, target=logps, staleness=stalenesses)
def test_linear_lies_above_loglinear(behave: float, target: float, staleness: int):
    """The logarithm of a mean is at least the mean of the logarithms."""
    above, below = (prox(behave, target, staleness, method) for method in ("linear", "loglinear"))
    assert above >= below - 1e-12


@given(behave=logps, target=logps, staleness=st.integers(2, 100))
def test_loglinear_in_closed_form(behave: float, target: float, staleness: int):
    """r = x^alpha and w r = x, with x = pi_theta / pi_behave."""
    anchor = prox(behave, target, staleness, "loglinear")
    assert np.isclose(target - anchor, (target - behave) / staleness, atol=1e-12)
    assert np.isclose((anchor - behave) + (target - anchor), target - behave, atol=1e-12)


@given(behave=logps, target=logps, staleness=st.integers(2, 100))
def test_linear_in_closed_form_and_its_bound(behave: float, target: float, staleness: int):
    """r = x / (alpha + (1 - alpha) x) < d / (d - 1)."""
    ratio = np.exp(target - prox(behave, target, staleness, "linear"))
    x, alpha = np.exp(target - behave), 1 / staleness
    assert np.isclose(ratio, x / (alpha + (1 - alpha) * x), rtol=1e-9)
    assert ratio <= staleness / (staleness - 1) * (1 + 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("target", [-torch.inf, torch.inf, torch.nan])
def test_a_fresh_tokens_anchor_is_the_behaviour_whatever_the_target(
    method: Method, staleness: int, target: float
):
    assert prox(-1.5, target, staleness, method) == -1.5


@pytest.mark.parametrize("method", METHODS)
def test_infinities_on_prompt_tokens_stay_there(method: Method):
    behave = torch.tensor([-torch.inf, 0.0, -1.0])
    target = torch.tensor([torch.nan, -torch.inf, -2.0])
    found = approximate_proximal_logp(behave, target, torch.tensor([-1, -1, 3]), 5, method)
    assert found[:2].tolist() == [-torch.inf, 0.0]
    assert found[2].isfinite()


def test_infinite_log_probs_of_stale_tokens_have_their_limits():
    assert prox(-1.0, -torch.inf, 2, "loglinear") == -torch.inf
    assert np.isclose(prox(-1.0, -torch.inf, 2, "linear"), -1 - np.log(2))
    assert prox(-torch.inf, -torch.inf, 2, "linear") == -torch.inf


def test_wrong_input_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"versions\[5\] is 6; it must lie between -1 and current_version, 5"
    ):
        approximate_proximal_logp(BEHAVE, TARGET, torch.tensor([0, 0, 0, 0, 0, 6, 7]), 5, "loglinear")
    with pytest.raises(ValueError, match=r"versions\[0\] is -2"):
        approximate_proximal_logp(BEHAVE, TARGET, VERSIONS - 1, 5, "loglinear")
    with pytest.raises(
        ValueError, match="method is 'log-linear'; it must be one of loglinear, linear, rollout"
    ):
        approximate_proximal_logp(BEHAVE, TARGET, VERSIONS, 5, "log-linear")


def test_staleness_of_trained_tokens_names_the_trajectory_it_refuses():
    assert trained_staleness(np.array([3, 3, 7], dtype=np.int32), 7).tolist() == [4, 4, 0]
    with pytest.raises(
        ValueError, match=r"prompt 4, sample 2: trained token 1 has version 8, newer than .* 7"
    ):
        trained_staleness(np.array([3, 8]), 7, "prompt 4, sample 2")
    with pytest.raises(
        ValueError, match="trained token 0 has version -1, which marks a token nobody generated"
    ):
        trained_staleness(np.array([-1, 3]), 7)
