"""What happened in the rollout process since the last batch, counted as it happens."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from megatron_a3po.rollout.trajectory import Group


@dataclass
class RolloutCounters:
    """`rewards` and `scored` cover every scored trajectory, before any filter."""

    rewards: float = 0.0
    scored: int = 0
    truncated: int = 0
    dropped_groups: int = 0
    filtered_groups: int = 0
    failed_groups: int = 0
    aborted: int = 0

    def count_scored(self, group: Group) -> None:
        self.rewards += sum(trajectory.reward or 0.0 for trajectory in group.trajectories)
        self.scored += len(group.trajectories)
        self.truncated += sum(trajectory.finish_reason == "length" for trajectory in group.trajectories)

    def count_only(self, groups: Iterable[Group]) -> None:
        """Forget what was counted and count these: where a batch's metrics are to be its own, not the moment's."""
        self.__init__()
        for group in groups:
            self.count_scored(group)

    def take(self) -> dict[str, float]:
        """The metrics of a batch, by their names in the metrics file; counting starts again."""
        metrics = {
            "rollout/dropped_groups": float(self.dropped_groups),
            "rollout/filtered_groups": float(self.filtered_groups),
            "rollout/failed_groups": float(self.failed_groups),
            "rollout/aborted": float(self.aborted),
            "rollout/truncated": float(self.truncated),
        }
        if self.scored:
            metrics["reward/avg"] = self.rewards / self.scored
        self.__init__()
        return metrics

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class IdleTime:
    """Seconds in which nothing to train on was asked of the engine: it could have generated, and might not."""

    def __init__(self) -> None:
        self._num_under_way = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Around a request; requests overlap."""
        self._add()
        self._num_under_way += 1
        try:
            yield
        finally:
            self._add()
            self._num_under_way -= 1

    def take(self) -> float:
        """Since the last call."""
        self._add()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add(self) -> None:
        now = time.monotonic()
        if self._num_under_way == 0:
            self._seconds += now - self._since
        self._since = now
