"""From groups to mini-batches of aligned sequences, and the files batches are kept in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.rollout import RolloutSection
from megatron_a3po.errors import InputError, TrainingError
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch, align, batch_path, load_batch, save_batch, supervised_sequence
from tests.trainer.runs import batch_of

ROLLOUT = RolloutSection(max_response_tokens=10)


def actor(**keys: Any) -> ActorSection:
    return ActorSection(**keys)


def trajectory(**changes: Any) -> Trajectory:
    """Two prompt tokens, then R1 R2 R3 of versions 3, 3 and 7."""
    values: dict[str, Any] = {
        "prompt_index": 4,
        "sample": 0,
        "tokens": np.array([10, 11, 21, 22, 23], np.int32),
        "prompt_length": 2,
        "versions": np.array([-1, -1, 3, 3, 7], np.int32),
        "behave_logp": np.array([0.0, 0.0, -1.0, -2.0, -3.0], np.float32),
        "finish_reason": "stop",
        "reward": 1.0,
    }
    return Trajectory(**{**values, **changes})


def group(*rewards: float, **changes: Any) -> Group:
    samples = [trajectory(sample=i, reward=reward, **changes) for i, reward in enumerate(rewards)]
    return Group(4, "p", "a", tuple(samples))


def test_every_field_meets_the_loss_where_its_token_is_predicted() -> None:
    """P P R1 R2 R3 of versions [-1, -1, 3, 3, 7] are trained as [3, 3, 7]."""
    ((first, second),) = align(Batch([group(1.0, 0.0)], 8), actor(), ROLLOUT)
    assert first.name == "prompt 4, sample 0"
    assert first.tokens.tolist() == [10, 11, 21, 22, 23]
    assert first.labels.tolist() == [11, 21, 22, 23, 0]
    assert first.loss_mask.tolist() == [False, True, True, True, False]
    assert (8 - first.staleness[first.loss_mask]).tolist() == [3, 3, 7]
    assert first.behave_logp[first.loss_mask].tolist() == [-1.0, -2.0, -3.0]
    assert first.loss_weights.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert first.denominator == 3
    half = 0.5 / (np.sqrt(0.5) + 1e-5)
    np.testing.assert_allclose(first.advantages[first.loss_mask], half, rtol=1e-6)
    np.testing.assert_allclose(second.advantages[second.loss_mask], -half, rtol=1e-6)


def test_what_a_workflow_gave_is_context_and_nothing_else() -> None:
    """P P R1 G R2: the given token is predicted by nobody, and no mean counts it."""
    talk = {"given": ((3, 4),), "versions": np.array([-1, -1, 3, -1, 7], np.int32)}
    talk["behave_logp"] = np.array([0, 0, -1, -np.inf, -3], np.float32)
    ((one, _),) = align(Batch([group(1.0, 0.0, **talk)], 8), actor(loss_mean="sequence"), ROLLOUT)
    assert one.tokens.tolist() == [10, 11, 21, 22, 23]
    assert one.loss_mask.tolist() == [False, True, False, True, False]
    assert one.labels[one.loss_mask].tolist() == [21, 23]
    assert one.staleness[one.loss_mask].tolist() == [5, 1]
    assert one.behave_logp[one.loss_mask].tolist() == [-1.0, -3.0]
    assert one.loss_weights.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]
    ((one, _),) = align(Batch([group(1.0, 0.0, **talk)], 8), actor(), ROLLOUT)
    assert one.denominator == 2


@pytest.mark.parametrize(
    ("loss_mean", "weight", "denominator"), [("token", 1.0, 3), ("sequence", 1 / 3, 1), ("constant", 1.0, 10)]
)
def test_the_loss_mean_is_weights_and_a_denominator(loss_mean: str, weight: float, denominator: int) -> None:
    ((sequence, _),) = align(Batch([group(1.0, 0.0)], 8), actor(loss_mean=loss_mean), ROLLOUT)
    np.testing.assert_allclose(sequence.loss_weights[sequence.loss_mask], weight, rtol=1e-6)
    assert sequence.denominator == denominator


@given(st.integers(1, 4), st.integers(1, 4))
def test_mini_batches_are_cut_in_batch_order_and_keep_groups_whole(
    num_mini_batches: int, groups_each: int
) -> None:
    batch = batch_of(num_mini_batches * groups_each)
    batch = Batch([replace(g, trajectories=tuple(map(_finite, g.trajectories))) for g in batch.groups], 7)
    mini_batches = align(batch, actor(num_mini_batches=num_mini_batches), ROLLOUT)
    assert [len(mini_batch) for mini_batch in mini_batches] == [2 * groups_each] * num_mini_batches
    names = [sequence.name for mini_batch in mini_batches for sequence in mini_batch]
    assert names == [f"prompt {g}, sample {s}" for g in range(len(batch.groups)) for s in range(2)]


def _finite(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, behave_logp=np.nan_to_num(trajectory.behave_logp, neginf=-1.0))


def test_a_masked_truncation_is_not_trained_but_still_compared() -> None:
    """Its reward stays in the group's baseline; the loss and its denominator never see it."""
    samples = group(1.0, 0.0, 0.0).trajectories
    cut = Group(4, "p", "a", (replace(samples[0], finish_reason="length"), *samples[1:]))
    (everything,) = align(Batch([cut], 8), actor(), ROLLOUT)
    masked = RolloutSection(max_response_tokens=10, mask_truncated=True)
    (rest,) = align(Batch([cut], 8), actor(), masked)
    assert [sequence.name for sequence in everything] == [f"prompt 4, sample {i}" for i in range(3)]
    assert [sequence.name for sequence in rest] == ["prompt 4, sample 1", "prompt 4, sample 2"]
    for sequence, other in zip(rest, everything[1:], strict=True):
        assert sequence.advantages.tolist() == other.advantages.tolist()
        assert sequence.advantages[0] < 0


def test_a_demonstration_trains_its_response_alone() -> None:
    sequence = supervised_sequence("d", np.array([5, 6], np.int32), np.array([7, 8, 1], np.int32))
    assert sequence.labels[sequence.loss_mask].tolist() == [7, 8, 1]
    assert sequence.denominator == 3


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no version": ({"versions": np.array([-1, -1, 3, -1, 7], np.int32)}, "trained token 1 has version -1"),
    "the future": ({"versions": np.array([-1, -1, 3, 3, 9], np.int32)}, "version 9, newer than .* 8"),
    "nan": ({"behave_logp": np.array([0, 0, -1, np.nan, -1], np.float32)}, "of token 3 is nan"),
    "-inf": ({"behave_logp": np.array([0, 0, -np.inf, -1, -1], np.float32)}, "of token 2 is -inf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_on_names_trajectory_and_position(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(TrainingError, match=f"prompt 4, sample 0: .*{message}"):
        align(Batch([group(1.0, 0.0, **changes)], 8), actor(), ROLLOUT)


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_a_reward_that_is_no_number_names_its_trajectory(reward: float | None) -> None:
    samples = group(1.0, 0.0).trajectories
    spoiled = Group(4, "p", "a", (samples[0], replace(samples[1], reward=reward)))
    with pytest.raises(TrainingError, match="prompt 4, sample 1: the reward is"):
        align(Batch([spoiled], 8), actor(), ROLLOUT)


def test_an_advantage_beyond_float32_names_the_reward_behind_it() -> None:
    with pytest.raises(TrainingError, match=r"prompt 4, sample 1: the advantage is not finite.* -1e\+200"):
        align(Batch([group(1.0, -1e200, 0.0)], 8), actor(advantage="rloo"), ROLLOUT)


def test_numbers_of_the_prompt_do_not_matter() -> None:
    """An infinity on a token nobody generated reaches no trained position."""
    prompt = np.array([np.nan, -np.inf, -1, -2, -3], np.float32)
    ((sequence, _),) = align(Batch([group(1.0, 0.0, behave_logp=prompt)], 8), actor(), ROLLOUT)
    assert sequence.behave_logp[sequence.loss_mask].tolist() == [-1.0, -2.0, -3.0]


def test_a_batch_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    unscored = trajectory(prompt_index=9, reward=None, finish_reason="length")
    groups = [
        *batch_of(2).groups,
        Group(9, "1+1=\u00e9", "2", (trajectory(prompt_index=9, sample=1), unscored)),
    ]
    path = batch_path(tmp_path / "batches", 12)
    save_batch(path, Batch(groups, 7))
    found = load_batch(path)
    assert path.name == "step-000012.npz"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert found.version == 7
    for group_, other in zip(found.groups, groups, strict=True):
        assert (group_.prompt_index, group_.prompt, group_.answer) == (
            other.prompt_index,
            other.prompt,
            other.answer,
        )
        for one, two in zip(group_.trajectories, other.trajectories, strict=True):
            for name in ("tokens", "versions", "behave_logp"):
                array, expected = getattr(one, name), getattr(two, name)
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(array, expected)
            assert (one.prompt_index, one.sample, one.prompt_length, one.finish_reason) == (
                two.prompt_index,
                two.sample,
                two.prompt_length,
                two.finish_reason,
            )
            assert repr(one.reward) == ("nan" if two.reward is None else repr(two.reward))


@pytest.mark.parametrize("content", [b"", b"no batch", "cut", "other arrays"])
def test_a_file_that_is_no_batch_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "step-000001.npz"
    if content == "other arrays":
        np.savez(path, tokens=np.zeros(3))
    else:
        save_batch(path, batch_of(1))
        whole = path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"step-000001\.npz is no batch of this program"):
        load_batch(path)
