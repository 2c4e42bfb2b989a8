"""What the trainer knows of the rollouts at any moment, so that their process may die: a state and what came since.

After every batch the client asks for the state, as a checkpoint does, and remembers the latest answer here, with the
batches it was given and the versions it announced since. From these a new process starts where the old one was as far
as is known: no prompt is lost and none is trained on twice; what had been generated since the last state is generated
again. No torch here, no process either: that is `client.py`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_a3po.rollout.messages import Start
from megatron_a3po.rollout.trajectory import Group, RolloutBatch

NOTHING: dict[str, Any] = {"cursor": 0, "admission_order": [], "finished": []}
Published = tuple[int, Path]


class Ledger:
    """`consumed_steps` counts the batches that reached the trainer, over all starts of the run."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self.consumed_steps = start.consumed_steps
        self._state, self._state_steps = start.state, start.consumed_steps
        self._consumed: dict[int, list[Group]] = {}  # by step, since the state
        self._published: dict[int, Path] = {start.first_version: start.weights_dir}

    def consume(self, batch: RolloutBatch) -> None:
        self._consumed[self.consumed_steps] = batch.groups
        self.consumed_steps += 1

    def publish(self, version: int, directory: Path) -> None:
        self._published[version] = directory
        # Older ones generate nothing any more, and need not be there.
        oldest = version - self._start.config.rollout.bound
        self._published = {one: path for one, path in self._published.items() if one >= oldest}

    def remember(self, state: dict[str, Any], steps: int) -> None:
        """A state that was asked for after `steps` batches."""
        if steps >= self._state_steps:
            self._state, self._state_steps = state, steps
            self._consumed = {step: groups for step, groups in self._consumed.items() if step >= steps}

    def as_of(self, steps: int, state: dict[str, Any]) -> dict[str, Any]:
        """A state that was asked for after `steps` batches, of what a process says that was started later: with the
        batches taken in between, and without what later weights have generated, which its checkpoint does not know."""
        producer = dict(state["producer"])
        since = {step: groups for step, groups in self._consumed.items() if step >= steps}
        if "waiting" in producer:
            last = steps + (self._start.config.rollout.fixed_staleness or 0)
            waiting = {**since, **{int(step): groups for step, groups in producer["waiting"].items()}}
            producer["waiting"] = {step: groups for step, groups in waiting.items() if step <= last}
        else:
            taken = [group for groups in since.values() for group in groups]
            known = [*taken, *producer["finished"]]
            producer["finished"] = [group for group in known if group.newest_version <= steps]
            indices = [group.prompt_index for group in taken]
            producer["admission_order"] = [*indices, *producer["admission_order"]]
        return {**state, "producer": producer}

    def restart(self) -> tuple[Start, list[Published]]:
        """What a new process starts with, and the versions to publish to it then, one after the other."""
        staleness = self._start.config.rollout.fixed_staleness
        if staleness is None:
            version = max(self._published)
            return self._start_with(version, self._continuous()), []
        state, version = self._waves(staleness)
        later = sorted(one for one in self._published.items() if one[0] > version)
        return self._start_with(version, state), later

    def _start_with(self, version: int, producer: dict[str, Any]) -> Start:
        counters = self._state["counters"] if self._state else {}
        return replace(
            self._start,
            state={"producer": producer, "counters": counters},
            first_version=version,
            weights_dir=self._published[version],
            consumed_steps=self.consumed_steps,
        )

    def _continuous(self) -> dict[str, Any]:
        """The last state without what has been consumed since; whatever was admitted since is under way."""
        state = self._state["producer"] if self._state else NOTHING
        consumed = {group.prompt_index for groups in self._consumed.values() for group in groups}
        cursor = max([state["cursor"], *(index + 1 for index in consumed)])
        since = range(state["cursor"], cursor)
        return {
            **state,
            "cursor": cursor,
            "admission_order": list(_without(consumed, [*state["admission_order"], *since])),
            "finished": [group for group in state["finished"] if group.prompt_index not in consumed],
        }

    def _waves(self, staleness: int) -> tuple[dict[str, Any], int]:
        """The waiting batches that are left, and the version that generates the first one missing."""
        kept = self._state["producer"]["waiting"] if self._state else {}
        waiting = {int(step): groups for step, groups in kept.items() if int(step) >= self.consumed_steps}
        missing = self.consumed_steps
        while missing in waiting:
            missing += 1
        generates_it = max(missing - staleness, self._start.first_version)
        return {"waiting": waiting}, min(generates_it, max(self._published))


def _without(consumed: set[int], indices: Iterable[int]) -> Iterable[int]:
    return (index for index in indices if index not in consumed)
