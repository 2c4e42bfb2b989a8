"""Where batches come from, the same on every rank: live rollouts, or batches kept by an earlier run.

Rank 0 has the batch; one broadcast of host objects hands it on. What went wrong on rank 0, and a wish to stop, travel
the same way, so that every rank ends at the same step with the same exit code.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from megatron_a3po.actor.grid import Grid
from megatron_a3po.errors import A3POError, InputError
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.trainer.batch import Batch, batch_path, load_batch

T = TypeVar("T")
POLL_S = 0.2


class StopWish:
    """Set by SIGTERM, SIGUSR1 or ctrl-C; looked at between steps and while waiting for samples."""

    def __init__(self) -> None:
        self.wished = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._wish)

    def _wish(self, number: int, frame: Any) -> None:
        self.wished = True


class Source(Protocol):
    """Batches in the order of steps. `publishes`: somebody generates with the weights it leads to."""

    publishes: bool
    statistics: dict[str, float]

    def next(self, version: int) -> Batch | None:
        """The batch of the step that begins with `version`; None: stop here. Collective over all ranks."""
        ...


class LiveSource:
    """Batches from the rollout process, which rank 0 talks to."""

    publishes = True

    def __init__(self, grid: Grid, client: RolloutClient | None, stop: StopWish) -> None:
        self.grid, self.client, self.stop = grid, client, stop
        self.statistics: dict[str, float] = {}  # what the rollout process said beside the latest batch

    def next(self, version: int) -> Batch | None:
        return from_main(self.grid, lambda: self._wait(version))

    def _wait(self, version: int) -> Batch | None:
        assert self.client is not None
        while not self.stop.wished:
            try:
                rollouts = self.client.next_batch(version, timeout_s=POLL_S)
            except TimeoutError:
                continue
            self.statistics = rollouts.statistics
            return Batch(rollouts.groups, version)
        return None


class ReplaySource:
    """Batches of `trainer.replay`, one a step; the version each began with is in its file."""

    publishes = False

    def __init__(self, grid: Grid, directory: Path, stop: StopWish) -> None:
        self.grid, self.directory, self.stop = grid, directory, stop
        self.statistics: dict[str, float] = {}

    def next(self, version: int) -> Batch | None:
        return from_main(self.grid, lambda: None if self.stop.wished else self._load(version + 1))

    def _load(self, step: int) -> Batch:
        path = batch_path(self.directory, step)
        if not path.is_file():
            raise InputError(
                f"{path} is missing: trainer.replay has no batch for step {step}; lower trainer.steps"
            )
        return load_batch(path)


def from_main(grid: Grid, make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; an error it raises is raised everywhere. Collective."""
    box: list[Any] = [None, None]
    if grid.is_main:
        try:
            box = [make(), None]
        except A3POError as error:
            box = [None, error]
    dist.broadcast_object_list(box, src=0, group=grid.host_group)
    if box[1] is not None:
        raise box[1]
    return box[0]
