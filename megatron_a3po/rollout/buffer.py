"""Where groups wait between admission and training, and which of them a step consumes: the staleness policies.

    wait    strict admission order. With the gate's rule the k-th surviving group was admitted at a version of at least
            k // groups_per_step - max_staleness and is consumed by step k // groups_per_step: a bound.
    drop    first finished first; a group over the bound is evicted, and its slot given back.
    train   first finished first, whatever its age: the bound is soft.

Pure and synchronous: no engine, no clock, no asyncio. The gate it belongs to is in `staleness_gate.py`, the loop that
drives both in `continuous.py`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.trajectory import Group

StalenessPolicy = Literal["wait", "drop", "train"]


class Buffer:
    """Admitted groups by prompt index, unfinished ones included."""

    def __init__(self, policy: StalenessPolicy, max_staleness: int, groups_per_step: int) -> None:
        self.policy: StalenessPolicy = policy
        self.max_staleness = max_staleness
        self.groups_per_step = groups_per_step
        self._unfinished: OrderedDict[int, None] = OrderedDict()
        # In the order of consumption among the finished: by admission under `wait`, by finishing otherwise.
        self._finished: OrderedDict[int, Group] = OrderedDict()
        self._admission: OrderedDict[int, None] = OrderedDict()

    def admit(self, prompt_index: int) -> None:
        if prompt_index in self._admission:
            raise AssertionError(f"prompt {prompt_index} was admitted twice")
        self._admission[prompt_index] = self._unfinished[prompt_index] = None

    def finish(self, group: Group) -> None:
        """An admitted group has all its samples and rewards."""
        del self._unfinished[group.prompt_index]
        self._finished[group.prompt_index] = group

    def discard(self, prompt_index: int) -> None:
        """An admitted group that will not be trained on: filtered or failed."""
        del self._unfinished[prompt_index], self._admission[prompt_index]

    def evict(self, version: int) -> list[Group]:
        """Under `drop`, remove the finished groups that are over the bound at `version`, and return them."""
        if self.policy != "drop":
            return []
        over = [
            group for group in self._finished.values() if self._staleness(group, version) > self.max_staleness
        ]
        for group in over:
            self._remove(group)
        return over

    def take(self, version: int) -> list[Group] | None:
        """The batch of the step that begins with `version`, or None while it is not complete. Call `evict` first."""
        ready = self._ready()[: self.groups_per_step]
        if len(ready) < self.groups_per_step:
            return None
        for group in ready:
            if self.policy != "train" and self._staleness(group, version) > self.max_staleness:
                raise RolloutError(
                    f"the group of prompt {group.prompt_index} has tokens of version {group.oldest_version}, more than "
                    f"rollout.max_staleness={self.max_staleness} before version {version}: the bound was broken."
                )
            self._remove(group)
        return ready

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def num_finished(self) -> int:
        return len(self._finished)

    @property
    def unfinished(self) -> list[int]:
        """Prompt indices under way, in the order of their admission."""
        return list(self._unfinished)

    @property
    def finished(self) -> list[Group]:
        """Finished groups that no step has consumed, in the order in which they finished."""
        return list(self._finished.values())

    @property
    def admission_order(self) -> list[int]:
        """Prompt indices of all groups here, in the order of their admission."""
        return list(self._admission)

    def restore(self, admission_order: Sequence[int], finished: Sequence[Group]) -> None:
        """Take over what another buffer held; its unfinished groups are unfinished here too."""
        for prompt_index in admission_order:
            self.admit(prompt_index)
        for group in finished:
            self.finish(group)

    def _ready(self) -> list[Group]:
        if self.policy != "wait":
            return self.finished
        ready: list[Group] = []
        for prompt_index in self._admission:
            if (group := self._finished.get(prompt_index)) is None:
                break
            ready.append(group)
        return ready

    def _staleness(self, group: Group, version: int) -> int:
        return version - group.oldest_version

    def _remove(self, group: Group) -> None:
        del self._finished[group.prompt_index], self._admission[group.prompt_index]
