"""Where batches come from, the same on every rank: live rollouts, or batches kept by an earlier run.

Rank 0 has the batch; one broadcast of host objects hands it on. What went wrong on rank 0, and a wish to stop, travel
the same way, so that every rank ends at the same step with the same exit code.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch.distributed as dist

from megatron_a3po.actor.grid import Grid
from megatron_a3po.config import Config
from megatron_a3po.errors import A3POError, InputError
from megatron_a3po.lifetime import StopWish, kill_point
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.trainer.attempt import Attempt
from megatron_a3po.trainer.batch import Batch, batch_path, check_replayed, load_batch
from megatron_a3po.trainer.journal import Journal

T = TypeVar("T")
POLL_S = 0.5


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

    def __init__(
        self,
        grid: Grid,
        client: RolloutClient | None,
        stop: StopWish,
        attempt: Attempt,
        journal: Journal | None,
    ) -> None:
        self.grid, self.client, self.stop, self.attempt, self.journal = grid, client, stop, attempt, journal
        self.statistics: dict[str, float] = {}  # what the rollout process said beside the latest batch
        self._num_filtered: Future[int] | None = None  # asked for, perhaps answered

    def next(self, version: int) -> Batch | None:
        return wait_on_main(self.grid, lambda timeout_s: self._wait(version, timeout_s))

    def _wait(self, version: int, timeout_s: float) -> Batch | None:
        assert self.client is not None
        deadline = time.monotonic() + timeout_s
        while not self.stop.wished:
            kill_point("generation")
            try:
                rollouts = self.client.next_batch(version, timeout_s=POLL_S)
            except TimeoutError:
                self.attempt.refuse_if_fenced()  # its servers may be another attempt's by now
                self._tell_filtered(version)
                if time.monotonic() > deadline:
                    raise
                continue
            self.statistics = rollouts.statistics
            return Batch(rollouts.groups, version)
        return None

    def _tell_filtered(self, version: int) -> None:
        """Where every group is filtered no batch comes, and nothing else would be said."""
        assert self.client is not None
        if self._num_filtered is None:
            self._num_filtered = self.client.num_filtered()
        elif self._num_filtered.done():
            if self.journal is not None:
                self.journal.wait(version + 1, self._num_filtered.result())
            self._num_filtered = None


class ReplaySource:
    """Batches of `trainer.replay`, one a step; the version each began with is in its file."""

    publishes = False

    def __init__(self, grid: Grid, config: Config, vocab_size: int, stop: StopWish) -> None:
        self.grid, self.config, self.vocab_size, self.stop = grid, config, vocab_size, stop
        self.directory = Path(config.trainer.replay or "")
        self.statistics: dict[str, float] = {}

    def next(self, version: int) -> Batch | None:
        return from_main(self.grid, lambda: None if self.stop.wished else self._load(version + 1))

    def _load(self, step: int) -> Batch:
        path = batch_path(self.directory, step)
        if not path.is_file():
            raise InputError(
                f"{path} is missing: trainer.replay has no batch for step {step}; lower trainer.steps"
            )
        batch = load_batch(path)
        check_replayed(batch, path, self.config, self.vocab_size)
        return batch


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


def wait_on_main(grid: Grid, attempt: Callable[[float], T]) -> T:
    """What `attempt(timeout_s)` returns on rank 0 once it raises no TimeoutError, on every rank. Collective.

    However long that takes, the ranks meet in between: no collective comes near the process group's time limit.
    """

    def once() -> tuple[bool, T | None]:
        try:
            return True, attempt(grid.patience_s)
        except TimeoutError:
            return False, None

    while True:
        done, value = from_main(grid, once)
        if done:
            return cast(T, value)


def result_on_main(grid: Grid, ask: Callable[[], "Future[T]"]) -> T:
    """What the future that `ask` makes on rank 0 resolves to, on every rank. Collective."""
    asked: list[Future[T]] = []

    def attempt(timeout_s: float) -> T:
        if not asked:
            asked.append(ask())
        return asked[0].result(timeout_s)

    return wait_on_main(grid, attempt)
