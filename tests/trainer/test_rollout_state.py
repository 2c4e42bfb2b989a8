"""What a checkpoint keeps of the rollouts comes back as it was, and runs nothing on the way."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.errors import InputError
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.rollout_state import read_rollout_state, write_rollout_state


def trajectory(prompt_index: int, sample: int, length: int, reward: float | None) -> Trajectory:
    rng = np.random.default_rng([prompt_index, sample])
    return Trajectory(
        prompt_index=prompt_index,
        sample=sample,
        tokens=rng.integers(0, 9, length).astype(np.int32),
        prompt_length=2,
        versions=np.array([-1, -1, *range(length - 2)], np.int32),
        behave_logp=-rng.random(length).astype(np.float32),
        finish_reason="length",
        reward=reward,
    )


GROUPS = [
    Group(7, 'a "prompt" \0 漢\n', "42", (trajectory(7, 0, 5, 0.1), trajectory(7, 1, 3, None))),
    Group(9, "", "", (replace(trajectory(9, 0, 7, float("nan")), given=((3, 4), (5, 6))),)),
]


def assert_same(found: Group, expected: Group) -> None:
    for name in ("prompt_index", "prompt", "answer"):
        assert getattr(found, name) == getattr(expected, name)
    for one, other in zip(found.trajectories, expected.trajectories, strict=True):
        for name, value in vars(other).items():
            kept = getattr(one, name)
            assert type(kept) is type(value)
            np.testing.assert_array_equal(kept, value)
            assert getattr(kept, "dtype", None) == getattr(value, "dtype", None)


def test_groups_come_back_bit_for_bit(tmp_path: Path):
    counters = {"rewards": 0.1 + 0.2, "scored": 3}
    producer = {"cursor": 12, "admission_order": [7, 8, 9], "finished": GROUPS}
    write_rollout_state(tmp_path / "state", {"producer": producer, "counters": counters})
    found = read_rollout_state(tmp_path / "state")
    assert found is not None
    assert found["counters"] == counters
    assert {**found["producer"], "finished": 0} == {**producer, "finished": 0}
    for one, other in zip(found["producer"]["finished"], GROUPS, strict=True):
        assert_same(one, other)


def test_waiting_batches_of_fixed_staleness(tmp_path: Path):
    write_rollout_state(tmp_path / "state", {"producer": {"waiting": {3: GROUPS, 4: GROUPS[:1]}}})
    found = read_rollout_state(tmp_path / "state")
    assert found is not None
    waiting = found["producer"]["waiting"]
    assert list(waiting) == ["3", "4"]
    assert_same(waiting["4"][0], GROUPS[0])


def test_a_run_without_rollouts(tmp_path: Path):
    write_rollout_state(tmp_path / "state", None)
    assert read_rollout_state(tmp_path / "state") is None


def test_what_is_no_data_is_not_kept(tmp_path: Path):
    with pytest.raises(TypeError, match="holds a PosixPath"):
        write_rollout_state(tmp_path / "state", {"folder": tmp_path})


class Attack:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_code_in_the_file_is_never_run(tmp_path: Path):
    attack = np.array([Attack(tmp_path / "canary")], dtype=object)
    with (tmp_path / "state").open("wb") as file:
        np.savez(file, state=attack, tokens=attack)
    with pytest.raises(InputError, match=r"state is no state of rollouts"):
        read_rollout_state(tmp_path / "state")
    assert not (tmp_path / "canary").exists()
    with np.load(tmp_path / "state", allow_pickle=True) as trusting:
        trusting["state"]
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"], ids=repr)
def test_a_damaged_file(tmp_path: Path, content: bytes):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(InputError, match=r"state is no state of rollouts"):
        read_rollout_state(tmp_path / "state")
