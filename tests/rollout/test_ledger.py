"""What the trainer knows of the rollouts, against a world that knows everything: any order of events, any death."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.rollout.ledger import Ledger
from megatron_a3po.rollout.messages import Start
from megatron_a3po.rollout.trajectory import Group, RolloutBatch, Trajectory

GROUPS = 2
EVENTS = st.lists(st.sampled_from(["admit", "finish", "take", "hear", "die"]), max_size=60)


def start(fixed_staleness: int | None = None, state: Any = None, steps: int = 0) -> Start:
    rollout = SimpleNamespace(fixed_staleness=fixed_staleness, bound=fixed_staleness or 3)
    config = cast(Any, SimpleNamespace(rollout=rollout))
    return Start(config, Path("run"), 1, state, steps, Path(f"version-{steps}"), steps)


def group(index: int, version: int) -> Group:
    versions = np.array([-1, version], np.int32)
    one = Trajectory(index, 0, versions, 1, versions, np.zeros(2, np.float32), "stop", 1.0)
    return Group(index, "p", "a", (one,))


class World:
    """A rollout process of the policy `wait`, with everything it ever did."""

    def __init__(self) -> None:
        self.ledger = Ledger(start())
        self.cursor, self.order, self.finished = 0, list[int](), dict[int, Group]()
        self.trained: list[int] = []

    def admit(self) -> None:
        self.order.append(self.cursor)
        self.cursor += 1

    def finish(self) -> None:
        if unfinished := [index for index in self.order if index not in self.finished]:
            index = unfinished[len(unfinished) // 2]
            self.finished[index] = group(index, len(self.trained) // GROUPS)

    def take(self) -> None:
        batch = self.order[:GROUPS]
        if len(batch) == GROUPS and all(index in self.finished for index in batch):
            self.order = self.order[GROUPS:]
            self.ledger.consume(RolloutBatch([self.finished.pop(index) for index in batch]))
            self.trained += batch
            version = len(self.trained) // GROUPS
            self.ledger.publish(version, Path(f"version-{version}"))

    def hear(self) -> None:
        producer = {
            "cursor": self.cursor,
            "admission_order": list(self.order),
            "finished": list(self.finished.values()),
        }
        self.ledger.remember({"producer": producer, "counters": {}}, self.ledger.consumed_steps)

    def die(self) -> None:
        anew, publications = self.ledger.restart()
        assert publications == []
        assert anew.first_version == anew.consumed_steps == len(self.trained) // GROUPS
        assert anew.state is not None
        producer = anew.state["producer"]
        self.cursor, self.order = producer["cursor"], list(producer["admission_order"])
        self.finished = {one.prompt_index: one for one in producer["finished"]}
        assert self.finished.keys() <= set(self.order)


@given(EVENTS)
def test_no_prompt_is_lost_and_none_comes_twice(events: list[str]):
    world = World()
    for event in events:
        getattr(world, event)()
        assert world.trained == list(range(len(world.trained)))
        assert sorted(world.trained + world.order) == list(range(world.cursor))


def test_a_state_that_was_asked_for_before_a_death_is_of_its_own_step():
    ledger = Ledger(start())
    ledger.consume(RolloutBatch([group(0, 0), group(1, 0)]))
    ledger.consume(RolloutBatch([group(2, 0), group(3, 1)]))  # after the asking, at step 1
    later = {"cursor": 7, "admission_order": [4, 5, 6], "finished": [group(4, 1), group(5, 2)]}
    producer = ledger.as_of(1, {"producer": later, "counters": {}})["producer"]
    assert producer["admission_order"] == [2, 3, 4, 5, 6]
    assert [one.prompt_index for one in producer["finished"]] == [2, 3, 4], "5 has tokens of version 2"


def test_waves_go_on_with_the_version_of_the_first_one_missing():
    kept = {"producer": {"waiting": {"5": [group(10, 3)], 6: [group(12, 4)]}}, "counters": {}}
    ledger = Ledger(start(2, kept, steps=5))
    ledger.consume(RolloutBatch([group(10, 3)]))
    ledger.publish(6, Path("version-6"))
    anew, publications = ledger.restart()
    assert anew.state is not None
    assert list(anew.state["producer"]["waiting"]) == [6]
    assert (anew.first_version, anew.consumed_steps) == (5, 6)
    assert publications == [(6, Path("version-6"))]
    again = ledger.as_of(5, {"producer": {"waiting": {6: [], 7: [], 8: []}}, "counters": {}})
    assert sorted(again["producer"]["waiting"]) == [5, 6, 7], (
        "version 6 generates step 8, and is not in a checkpoint of 5"
    )
