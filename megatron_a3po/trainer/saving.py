"""Checkpoints written beside the training, at most one at a time. What is in one is in `recovery.py`, which reads them.

    begin     every rank notes its tensors of this moment; the rollouts are asked for their state
    (thread)  every rank copies its part to host memory, which the optimizer's next step waits for, writes it, and waits
              for the disk
    (thread)  rank 0 waits for all parts, writes the rest and the manifest, waits for the disk, and gives the folder its
              name, however long the step under way takes
    go_on     between steps the ranks agree that it is done, or hear what went wrong

Training waits for the first line alone; `finish` waits for all of it, when a run stops or ends. Killed at any moment
before the name is given, it leaves a folder with a suffix, which nobody reads.
"""

import concurrent.futures
import dataclasses
import json
import logging
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_a3po.actor import checkpoint as actor_checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.checkpoint import Written
from megatron_a3po.actor.snapshot import HostMemory, Snapshot
from megatron_a3po.actor.store import own_connection
from megatron_a3po.config import Config, to_yaml
from megatron_a3po.lifetime import kill_point
from megatron_a3po.trainer.attempt import Attempt
from megatron_a3po.trainer.recovery import FORMAT, PREFIX, ROLLOUTS, checkpoints_of, data_of, step_of
from megatron_a3po.trainer.rollout_state import write_rollout_state
from megatron_a3po.trainer.source import from_main
from megatron_a3po.weights.aside import (
    FULL,
    aside_of,
    drop_aside,
    make_durable,
    open_aside,
    put_in_place,
    remove,
    sync,
    what_failed,
)
from megatron_a3po.weights.manifest import write_manifest

logger = logging.getLogger(__name__)
POLL_S = 0.05


class Checkpoint:
    """The folder of one step's checkpoint: filled under a name with a suffix by all ranks, completed by rank 0."""

    def __init__(self, attempt: Attempt, step: int) -> None:
        self.attempt, self.step = attempt, step
        self.final = attempt.run_dir / "checkpoints" / f"{PREFIX}{step}"
        self._own = self.final.with_name(f"{self.final.name}.attempt-{attempt.number}")
        self.aside = aside_of(self._own)

    @property
    def actor_directory(self) -> Path:
        return self.aside / "actor"

    def open(self) -> None:
        """Rank 0, before any rank writes."""
        open_aside(self._own)
        self.actor_directory.mkdir()

    def drop(self) -> None:
        drop_aside(self._own)

    def complete(self, checksums: dict[str, str]) -> None:
        """Rank 0, once everything is written: the manifest, the disk, the final name."""
        kill_point("before_manifest")
        write_manifest(self.aside, FORMAT, {f"actor/{name}": one for name, one in checksums.items()})
        make_durable(self.aside)
        kill_point("before_rename")
        self.attempt.refuse_if_fenced()
        put_in_place(self.aside, self.final)
        kill_point("after_rename")
        sync(self.final.parent)

    def forget_older(self, keep_last: int, keep_every: int | None) -> None:
        """Rank 0, afterwards: those before this one that are not to be kept. Later steps are of another history, which
        this one has yet to replace."""
        so_far = [one for one in checkpoints_of(self.attempt.run_dir) if step_of(one) <= self.step]
        for old in so_far[:-keep_last]:
            if keep_every is None or step_of(old) % keep_every:
                remove(old)


@dataclass(frozen=True)
class Unwritten:
    """Why a rank could not write its part, and how many bytes of it are not there."""

    reason: str
    is_full: bool
    missing_bytes: int


Part = tuple[Written | Unwritten, int]  # and the bytes of the whole part


@dataclass
class UnderWay:
    """A checkpoint between its copy and its name. Rank 0 alone has `rest`: from all parts being there to the name."""

    checkpoint: Checkpoint
    trainer: dict[str, Any]
    common: bytes
    since: float
    part: "Future[None]"
    rest: "Future[str | None] | None" = None
    held_up_s: float = 0.0

    @property
    def own_work(self) -> "Future[Any]":
        """What this rank has to do before the ranks meet."""
        return self.rest or self.part


class Parts:
    """What every rank's thread says of its part, for rank 0's: the threads meet while the ranks are in their step."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._store = own_connection("checkpoint-parts")
        self._abandoned = threading.Event()

    def put(self, number: int, part: Part) -> None:
        self._store.set(f"{number}/{self._rank}", pickle.dumps(part))

    def take_all(self, number: int) -> list[Part]:
        """Wait for every rank's part of the checkpoint of this number."""
        keys = [f"{number}/{rank}" for rank in range(self._world_size)]
        while not self._store.check(keys):
            if self._abandoned.wait(POLL_S):
                raise RuntimeError("the run ends without this checkpoint")
        parts = [pickle.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return parts

    def abandon(self) -> None:
        """Nobody waits any more: a rank that is gone would be waited for in vain."""
        self._abandoned.set()


class Saving:
    """The checkpoints of a run. Every method but `abandon` is collective over all ranks."""

    def __init__(self, config: Config, actor: Actor, attempt: Attempt) -> None:
        self._config, self._actor, self._attempt = config, actor, attempt
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._parts = Parts(actor.grid.world_rank, actor.grid.world_size)
        self._data = data_of(config) if actor.grid.is_main else None
        self._number = 0  # of checkpoints begun
        self._under_way: UnderWay | None = None
        self._newest: int | None = None  # the step of the last one begun that has not failed
        self._problem: str | None = None  # of the last one begun

    @property
    def is_under_way(self) -> bool:
        return self._under_way is not None

    def begin(self, trainer: dict[str, Any], rollouts: "Future[dict[str, Any]] | None") -> None:
        """Save this moment. trainer: what the loop counts; rollouts: their state of this moment, on rank 0 alone."""
        self.finish()
        if self._newest == trainer["step"]:
            return
        since, self._problem = time.monotonic(), None
        checkpoint = Checkpoint(self._attempt, trainer["step"])
        if problem := from_main(self._actor.grid, lambda: _problem_of(checkpoint.open, checkpoint.aside)):
            self._give_up(checkpoint, problem)
            return
        state, copied = actor_checkpoint.snapshot(self._actor), threading.Event()
        common = actor_checkpoint.common_state(self._actor) if self._actor.grid.is_main else b""
        self._number, self._newest = self._number + 1, checkpoint.step
        part = self._thread.submit(self._write, self._number, state, copied, checkpoint.actor_directory)
        now = UnderWay(checkpoint, dict(trainer), common, since, part)
        if self._actor.grid.is_main:
            now.rest = self._thread.submit(self._complete, self._number, now, rollouts)
        self._actor.hold(copied)
        now.held_up_s = time.monotonic() - since
        self._under_way = now

    def go_on(self) -> None:
        """Hear of the checkpoint under way if it is done on all ranks, without waiting."""
        now = self._under_way
        if now is None:
            return
        if now.part.done():
            now.part.result()  # what nobody foresaw
        if not self._all(now.own_work.done()):
            return
        self._under_way = None
        problem = from_main(self._actor.grid, lambda: cast("Future[str | None]", now.rest).result())
        if problem is not None:
            self._give_up(now.checkpoint, problem)
        else:
            seconds = time.monotonic() - now.since
            logger.info(
                "%s is complete after %.2f s; training waited %.3f s",
                now.checkpoint.final,
                seconds,
                now.held_up_s,
            )

    def finish(self) -> str | None:
        """Wait until no checkpoint is under way. Returns what went wrong with the last."""
        while (now := self._under_way) is not None:
            concurrent.futures.wait([now.own_work], timeout=POLL_S)
            self.go_on()
        return self._problem

    def abandon(self) -> None:
        """On this rank alone, as the process ends: no thread waits for what will not come."""
        self._parts.abandon()

    def _write(self, number: int, state: Snapshot, copied: threading.Event, directory: Path) -> None:
        """In every rank's thread."""
        part = _written(state, self._memory, copied, directory, self._actor.grid.world_rank)
        self._parts.put(number, (part, state.num_bytes))

    def _complete(self, number: int, now: UnderWay, asked: "Future[dict[str, Any]] | None") -> str | None:
        """In rank 0's thread. Returns what went wrong with the files, or why the rollouts' state is not there. Errors:
        what the rollouts or a fence say."""
        checkpoint, aside = now.checkpoint, now.checkpoint.aside
        parts = self._parts.take_all(number)
        if failed := [part for part, _ in parts if isinstance(part, Unwritten)]:
            num_bytes = sum(size for _, size in parts)
            return _lack(failed, num_bytes, aside)
        patience_s = self._config.distributed.timeout_s
        # Under fixed_staleness the answer waits for samples, which may take as long as they like.
        limit_s = patience_s if self._config.rollout.fixed_staleness is None else None
        try:
            rollouts = asked.result(limit_s) if asked else None
        except TimeoutError:
            return f"the rollout process has not told its state within distributed.timeout_s={patience_s:g}"

        def write() -> None:
            checksums = actor_checkpoint.complete(
                checkpoint.actor_directory,
                [cast(Written, part) for part, _ in parts],
                now.common,
                template=self._actor.hf_path,
                layout=actor_checkpoint.layout_of(self._actor),
            )
            (aside / "config.yaml").write_text(to_yaml(self._config))
            (aside / "model.json").write_text(json.dumps(dataclasses.asdict(self._actor.shape)))
            (aside / "trainer.json").write_text(
                json.dumps({"attempt": self._attempt.number, "data": self._data, **now.trainer})
            )
            write_rollout_state(aside / ROLLOUTS, rollouts)
            checkpoint.complete(checksums)

        problem = _problem_of(write, aside)
        if problem is None:
            checkpoint.forget_older(self._config.trainer.keep_last, self._config.trainer.keep_every)
        return problem

    def _give_up(self, checkpoint: Checkpoint, problem: str) -> None:
        """The run goes on with the checkpoint it has; what is there of the new one is removed."""
        self._newest, self._problem = None, problem
        if not self._actor.grid.is_main:
            return
        checkpoint.drop()
        last = next(iter(checkpoints_of(self._attempt.run_dir)[::-1]), None)
        logger.error(
            "no checkpoint of step %d: %s. The run goes on; %s, and the next save is tried again",
            checkpoint.step,
            problem,
            f"its last checkpoint is {last}" if last else "it has no checkpoint yet",
        )

    def _all(self, ready: bool) -> bool:
        flag = torch.tensor([int(ready)])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._actor.grid.host_group)
        return bool(flag.item())


def _written(
    state: Snapshot, memory: HostMemory, copied: threading.Event, directory: Path, rank: int
) -> Written | Unwritten:
    """What there is of a rank's part once it has been tried."""
    try:
        copy = memory.copy(state)
    finally:
        copied.set()
    try:
        return actor_checkpoint.write(copy, directory, rank)
    except OSError as error:
        written = sum(file.stat().st_size for file in directory.glob(f"__{rank}_*"))
        return Unwritten(
            what_failed(error, directory), error.errno in FULL, max(0, state.num_bytes - written)
        )


def _problem_of(work: Callable[[], object], folder: Path) -> str | None:
    """Do it; the sentence of a file in `folder` that could not be written."""
    try:
        work()
    except OSError as error:
        return what_failed(error, folder) + ("; free some space" if error.errno in FULL else "")
    return None


def _lack(failed: list[Unwritten], num_bytes: int, folder: Path) -> str:
    """The first failure, and for a full disk how much it lacks."""
    missing = sum(one.missing_bytes for one in failed) - shutil.disk_usage(folder).free
    lack = f"; the checkpoint takes {num_bytes / 1e6:.1f} MB"
    if any(one.is_full for one in failed) and missing > 0:
        lack += f", for which {missing / 1e6:.1f} MB are missing: free some space"
    return failed[0].reason + lack
