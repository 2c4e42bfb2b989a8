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
from megatron_a3po.rollout.trajectory import RolloutBatch

NOTHING: dict[str, Any] = {"cursor": 0, "admission_order": [], "finished": []}
Published = tuple[int, Path]


class Ledger:
    """`consumed_steps` counts the batches that reached the trainer, over all starts of the run."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self.consumed_steps = start.consumed_steps
        self._state, self._state_steps = start.state, start.consumed_steps
        self._consumed: list[tuple[int, list[int]]] = []  # (step, prompt indices) since the state
        self._published: dict[int, Path] = {start.first_version: start.weights_dir}

    def consume(self, batch: RolloutBatch) -> None:
        indices = [group.prompt_index for group in batch.groups]
        self._consumed.append((self.consumed_steps, indices))
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
            self._consumed = [one for one in self._consumed if one[0] >= steps]

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
        consumed = {index for _, indices in self._consumed for index in indices}
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
