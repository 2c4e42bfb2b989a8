"""Checkpoints beside the training, on real ranks: what a full disk leaves, which are kept, what training waits for."""

import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import barrier

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.actor.snapshot import HostMemory
from megatron_a3po.config import Config
from megatron_a3po.config.distributed import DistributedSection
from megatron_a3po.trainer import saving as trainer_saving
from megatron_a3po.trainer.attempt import Attempt
from megatron_a3po.trainer.recovery import latest_checkpoint
from megatron_a3po.trainer.saving import Saving
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from tests.actor.ranks import on_actors, random_sequences
from tests.trainer.checkpoints import read_tensors
from tests.trainer.replay import Replays
from tests.trainer.task import Task, num_rows

SIZE = 8 << 20


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 8 MiB at `folder`, where this user may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def no_room(ballast: Path, is_main: bool, *, disk: bool) -> Iterator[None]:
    """Nothing more can be written: the disk is full, or files may not grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limits[1]))
    elif is_main:
        free = os.statvfs(ballast.parent).f_bavail * os.statvfs(ballast.parent).f_bsize
        ballast.write_bytes(b"x" * (free - (16 << 10)))
    barrier()
    try:
        yield
    finally:
        barrier()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if is_main:
            ballast.unlink(missing_ok=True)
        barrier()


def start(actor: Actor) -> None:
    actor.start_stage(Schedule(1e-3, 0.0, 2, "cosine", 10))


def train(actor: Actor, step: int) -> None:
    packs = actor.pack(random_sequences([9, 14, 5, 7], 12, seed=step))
    assert actor.update(packs, supervised_objective).applied


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(replays: Replays, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run_dir = tmp_path / "disk" / "run"
        run_dir.mkdir()

        def save(actor: Actor) -> list[str | None]:
            saving = Saving(_config(replays, run_dir), actor, Attempt(run_dir, 1))
            said: list[str | None] = []

            def saved(step: int) -> None:
                train(actor, step)
                saving.begin({"step": step}, _rollouts() if actor.grid.is_main else None)
                said.append(saving.finish())

            start(actor)
            saved(1)
            with no_room(run_dir / "ballast", actor.grid.is_main, disk=disk):
                saved(2)
                if actor.grid.is_main:  # which has removed what there was of it
                    assert names(run_dir) == ["step-1"]
                saved(3)  # tried again
            for step in (4, 5, 6):
                saved(step)
            saving.begin({"step": 6}, None)
            assert not saving.is_under_way, "this step has its checkpoint"
            return said

        said = on_actors(save, replays.folder / "model", dp=2)
        assert said[0] == said[1]
        first, full, again, *others = said[0]
        assert first is None
        assert others == [None] * 3
        for problem in (full, again):
            assert str(run_dir / "checkpoints" / "step-") in problem
            assert ("MB are missing: free some space" in problem) == disk
            assert ("No space left on device" if disk else "File too large") in problem
        assert names(run_dir) == ["step-5", "step-6"]
        assert latest_checkpoint(run_dir) == (run_dir / "checkpoints" / "step-6", ())


def test_rollouts_that_do_not_answer_hold_up_one_checkpoint(replays: Replays, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    def save(actor: Actor) -> list[str | None]:
        config = _config(replays, tmp_path / "run")
        config = config.model_copy(update={"distributed": DistributedSection(timeout_s=0.5)})
        saving = Saving(config, actor, Attempt(tmp_path / "run", 1))
        start(actor)
        said = []
        for step, rollouts in ((1, Future()), (2, _rollouts())):
            saving.begin({"step": step}, rollouts)
            said.append(saving.finish())
        return said

    (said,) = on_actors(save, replays.folder / "model")
    assert said == ["the rollout process has not told its state within distributed.timeout_s=0.5", None]
    assert names(tmp_path / "run") == ["step-2"]


def _rollouts() -> "Future[dict[str, Any]]":
    future: Future[dict[str, Any]] = Future()
    future.set_result({"producer": {"cursor": 3}, "counters": {}})
    return future


def _config(replays: Replays, run_dir: Path, **trainer: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"hf_path": str(replays.folder / "model")},
            "data": {"train": str(replays.folder / "train.jsonl")},
            "rollout": {"max_response_tokens": 8},
            "trainer": {"steps": 9, **trainer},
        }
    )


def test_the_copy_is_of_its_moment_though_training_goes_on(replays: Replays, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    copy, order = HostMemory.copy, []

    def late(memory: HostMemory, snapshot: Any) -> Any:
        forwarded.wait(60)
        order.append("copied")
        return copy(memory, snapshot)

    def save(actor: Actor) -> None:
        HostMemory.copy = late  # pyright: ignore[reportAttributeAccessIssue]
        saving = Saving(_config(replays, run_dir, keep_last=1, keep_every=2), actor, Attempt(run_dir, 1))
        start(actor)
        assert actor.optimizer is not None
        compute, change = actor.pipeline.train, actor.optimizer.step

        def computed(*arguments: Any) -> Any:
            outputs = compute(*arguments)
            order.append("computed")
            forwarded.set()  # only now the copying begins
            return outputs

        def changed(*arguments: Any) -> Any:
            order.append("changed")
            return change(*arguments)

        pipeline: Any = actor.pipeline
        optimizer: Any = actor.optimizer
        pipeline.train, optimizer.step = computed, changed
        for step in range(1, 6):
            expected = {name: shard.clone() for name, shard in actor.shards()}
            saving.begin({"step": step}, None)
            train(actor, step)
            assert order == ["computed", "copied", "changed"]
            assert saving.finish() is None
            stored = read_tensors(run_dir / "checkpoints" / f"step-{step}" / "actor")
            assert all(torch.equal(stored[name], one) for name, one in expected.items() if name in stored)
            assert expected.keys() & stored.keys()
            order.clear()
            forwarded.clear()

    forwarded = threading.Event()
    on_actors(save, replays.folder / "model")
    assert names(run_dir) == ["step-2", "step-4", "step-5"]


def test_steps_and_rollouts_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The checkpoint of step 4 gets its name once three further steps are done, on samples of newer weights."""
    task, run_dir = Task(tmp_path), tmp_path / "beside"

    def slow_disk() -> None:
        def until_steps_are_done(point: str) -> None:
            while point == "before_rename" and num_rows(run_dir) < 7:
                time.sleep(0.02)

        trainer_saving.kill_point = until_steps_are_done

    switches = ["trainer.steps=8", "trainer.save_every=4", "rollout.max_staleness=1"]
    ended = task.start("beside", *switches, before=slow_disk).wait()
    assert ended.code == 0, ended.output
    assert num_rows(run_dir) == 8
    newest = max(
        int(t.versions.max()) for group in task.batch("beside", 7).groups for t in group.trajectories
    )
    assert newest >= 5, "sampled with what was published after step 4"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("actor.lr=2e-4", "actor.lr"),
        ("trainer.seed=4", None),  # of prompts, which a replay has none of
    ],
)
def test_a_checkpoint_counts_in_the_same_way(replays: Replays, override: str, named: str | None) -> None:
    if not (replays.folder / "counts").is_dir():
        replays.run("counts", "trainer.steps=1", "trainer.save_every=1")
    checkpoint = replays.folder / "counts" / "checkpoints" / "step-1"
    ended = replays.ended(f"counts-{override}", "trainer.steps=1", override, "--resume", str(checkpoint))
    assert ended.code == (2 if named else 0), ended.output
    if named:
        assert f"{checkpoint} was written with another {named}, on which" in ended.output
