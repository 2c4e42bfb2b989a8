"""Loss means and advantages, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.algorithm.advantages import Estimator, group_advantages
from megatron_a3po.algorithm.loss_mean import LossMean, denominator, loss_weights

LENGTHS = np.array([2, 3, 0, 1])
MEANS: list[LossMean] = ["token", "sequence", "constant"]


def test_weights_and_denominators_by_hand():
    assert loss_weights(LENGTHS, "token").tolist() == [1] * 6
    assert loss_weights(LENGTHS, "constant").tolist() == [1] * 6
    third = np.float32(1 / 3)
    assert loss_weights(LENGTHS, "sequence").tolist() == [0.5, 0.5, third, third, third, 1]
    assert [denominator(LENGTHS, mean, 10) for mean in MEANS] == [6, 3, 30]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    mean=st.sampled_from(MEANS),
)
def test_parts_add_up_to_the_whole(lengths: list[int], cut: int, mean: LossMean):
    whole = np.array(lengths)
    parts = (whole[:cut], whole[cut:])
    assert sum(denominator(part, mean, 7) for part in parts) == denominator(whole, mean, 7)
    weights = np.concatenate([loss_weights(part, mean) for part in parts])
    assert np.array_equal(weights, loss_weights(whole, mean))
    if mean == "sequence":
        assert np.isclose(weights.sum(), denominator(whole, mean, 7))


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    deviation = np.sqrt(1 / 3) + 1e-5, 1.5 + 1e-5  # unbiased
    expected = np.array([[0.5, -0.5, -0.5, 0.5], [2.25, -0.75, -0.75, -0.75]])
    grpo = expected / np.array(deviation)[:, None]
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), grpo, rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, "dr_grpo"), expected, rtol=1e-12)
    others = np.array([[1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3], [3.0, -1.0, -1.0, -1.0]])
    np.testing.assert_allclose(group_advantages(rewards, "rloo"), others, rtol=1e-12)
    # over all eight: mean 5/8, sum of squares 11, unbiased variance (11 - 8 * 25/64) / 7
    whole = (rewards - 0.625) / (np.sqrt((11 - 3.125) / 7) + 1e-5)
    np.testing.assert_allclose(group_advantages(rewards, "reinforce_pp"), whole, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, 0.0])
def test_equal_rewards_give_exactly_zero(estimator: Estimator, reward: float):
    advantages = group_advantages(np.full((2, 7), reward), estimator)
    assert (advantages == 0).all()


def test_one_sample_has_nothing_to_be_compared_with():
    one_each = np.array([[1.0], [0.0]])
    estimators: list[Estimator] = ["grpo", "dr_grpo", "rloo"]
    for estimator in estimators:
        with pytest.raises(ValueError, match=f"{estimator} compares samples .* at least 2, and found 1"):
            group_advantages(one_each, estimator)
    assert group_advantages(one_each, "reinforce_pp").shape == (2, 1)  # the batch is the baseline


@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(["grpo", "dr_grpo", "rloo"]),
)
def test_a_groups_advantages_add_up_to_zero_and_know_no_offset(rewards: list, estimator: Estimator):
    table = np.array(rewards)
    advantages = group_advantages(table, estimator)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-6)
    alone = [group_advantages(group[None], estimator)[0] for group in table]
    np.testing.assert_array_equal(advantages, np.stack(alone))  # groups do not see each other
