"""The gate and the buffer as pure objects, driven by a small clockwork of generation and training."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.buffer import Buffer, StalenessPolicy
from megatron_a3po.rollout.staleness_gate import StalenessGate
from megatron_a3po.rollout.trajectory import Group, Trajectory

TICKS_PER_STEP = 2


def group(prompt_index: int, version: int) -> Group:
    trajectory = Trajectory(
        prompt_index=prompt_index,
        sample=0,
        tokens=np.array([5, 6, 1], np.int32),
        prompt_length=1,
        versions=np.array([-1, version, version + 1], np.int32),
        behave_logp=np.zeros(3, np.float32),
        finish_reason="stop",
        reward=1.0,
    )
    return Group(prompt_index, "", "", (trajectory,))


@dataclass
class Clockwork:
    """Group i takes `ticks(i)` ticks to generate and a training step takes TICKS_PER_STEP. Engines serve the trainer's
    version at once, and groups keep the version they began with: the worst case."""

    policy: StalenessPolicy
    max_staleness: int
    groups_per_step: int
    ticks: list[int]
    discarded: set[int] = field(default_factory=set)
    version: int = 0
    consumed: list[tuple[int, Group]] = field(default_factory=list)
    evicted: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = StalenessGate(self.max_staleness, self.groups_per_step)
        self.buffer = Buffer(self.policy, self.max_staleness, self.groups_per_step)

    def run(self, num_steps: int, max_ticks: int = 2000) -> None:
        under_way: dict[int, tuple[int, int]] = {}  # prompt index -> (tick it ends, version it began with)
        cursor, busy_until = 0, 0
        for tick in range(max_ticks):
            while self.gate.may_admit(self.version):
                self.gate.admit()
                self.buffer.admit(cursor)
                under_way[cursor] = (tick + self.ticks[cursor % len(self.ticks)], self.version)
                cursor += 1
            for index in [index for index, (end, _) in under_way.items() if end <= tick]:
                _, began = under_way.pop(index)
                if index in self.discarded:
                    self.buffer.discard(index)
                    self.gate.give_back()
                else:
                    self.buffer.finish(group(index, began))
            if tick < busy_until:
                continue
            evicted = self.buffer.evict(self.version)
            self.gate.give_back(len(evicted))
            self.evicted += evicted
            if (batch := self.buffer.take(self.version)) is not None:
                self.consumed += [(self.version, one) for one in batch]
                self.version += 1
                busy_until = tick + TICKS_PER_STEP
            if self.version == num_steps:
                return
        raise AssertionError(f"only {self.version} of {num_steps} steps in {max_ticks} ticks")

    @property
    def staleness(self) -> list[int]:
        return [version - one.oldest_version for version, one in self.consumed]


def with_straggler(eta: int, policy: StalenessPolicy) -> Clockwork:
    """The second group takes as long as 5 * eta training steps, all others one tick."""
    ticks = [1] * 1000
    ticks[1] = 5 * eta * TICKS_PER_STEP
    clockwork = Clockwork(policy, eta, 4, ticks)
    clockwork.run(8 * eta)
    return clockwork


@pytest.mark.parametrize("eta", [1, 2, 4])
def test_a_straggler_passes_the_bound_under_the_plain_rule(eta: int):
    assert max(with_straggler(eta, "train").staleness) > eta


@pytest.mark.parametrize("eta", [1, 2, 4])
def test_a_straggler_never_passes_the_bound_under_wait_and_is_not_lost(eta: int):
    clockwork = with_straggler(eta, "wait")
    assert max(clockwork.staleness) <= eta
    assert [one.prompt_index for _, one in clockwork.consumed] == list(range(len(clockwork.consumed)))


@pytest.mark.parametrize("eta", [1, 2, 4])
def test_a_straggler_is_evicted_under_drop_and_its_slot_given_back(eta: int):
    clockwork = with_straggler(eta, "drop")
    assert max(clockwork.staleness) <= eta
    assert [one.prompt_index for one in clockwork.evicted] == [1]
    outstanding = len(clockwork.buffer.admission_order)
    assert clockwork.gate.admitted == len(clockwork.consumed) + outstanding


worlds = st.builds(
    dict,
    max_staleness=st.integers(0, 4),
    groups_per_step=st.integers(1, 4),
    ticks=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    discarded=st.sets(st.integers(0, 60), max_size=30),
)


@given(worlds)
def test_wait_is_a_bound_in_strict_admission_order(world: dict):
    clockwork = Clockwork(policy="wait", **world)
    clockwork.run(10)
    assert max(clockwork.staleness) <= world["max_staleness"]
    order = [one.prompt_index for _, one in clockwork.consumed]
    assert order == [index for index in range(order[-1] + 1) if index not in world["discarded"]]


@given(worlds)
def test_drop_is_a_bound_and_nothing_is_consumed_twice(world: dict):
    # A duration of more than a step per bound would evict for ever: keep one group in reach of each step.
    world["ticks"] = [min(ticks, 3) if i % 2 else ticks for i, ticks in enumerate(world["ticks"])] + [1]
    clockwork = Clockwork(policy="drop", **world)
    clockwork.run(10)
    assert max(clockwork.staleness) <= world["max_staleness"]
    seen = [one.prompt_index for _, one in clockwork.consumed] + [
        one.prompt_index for one in clockwork.evicted
    ]
    assert len(seen) == len(set(seen))


@given(worlds)
def test_train_consumes_first_finished_first_whatever_the_age(world: dict):
    clockwork = Clockwork(policy="train", **world)
    clockwork.run(10)
    order = [one.prompt_index for _, one in clockwork.consumed]
    assert len(order) == len(set(order)) == 10 * world["groups_per_step"]
    assert not clockwork.evicted


@given(worlds, st.sampled_from(["wait", "drop", "train"]))
def test_the_gate_never_lets_more_in_than_its_rule(world: dict, policy: StalenessPolicy):
    world["ticks"] = [*world["ticks"], 1]
    clockwork = Clockwork(policy=policy, **world)
    clockwork.run(5, max_ticks=4000)
    assert clockwork.gate.admitted <= clockwork.gate.limit(clockwork.version)
    assert clockwork.gate.admitted == len(clockwork.consumed) + len(clockwork.buffer.admission_order)


def test_a_bound_of_zero_is_on_policy():
    clockwork = Clockwork("wait", 0, 3, [1, 7, 2])
    clockwork.run(6)
    assert set(clockwork.staleness) == {0}


def test_a_restored_buffer_goes_on_in_the_same_order():
    buffer = Buffer("wait", 2, 2)
    for index in range(5):
        buffer.admit(index)
    for index in (3, 0, 4):
        buffer.finish(group(index, 0))
    other = Buffer("wait", 2, 2)
    other.restore(buffer.admission_order, buffer.finished)
    assert other.unfinished == [1, 2]
    assert other.take(0) is None
    other.finish(group(1, 1))
    batch = other.take(1)
    assert batch is not None
    assert [one.prompt_index for one in batch] == [0, 1]


def test_wait_refuses_to_break_its_bound():
    buffer = Buffer("wait", 1, 1)
    buffer.admit(0)
    buffer.finish(group(0, 0))
    with pytest.raises(RolloutError, match=r"prompt 0 has tokens of version 0.*max_staleness=1"):
        buffer.take(2)
