"""Kills at every named point and at random moments: the next start goes on, and the run ends as if never killed.

What a kill interrupts is in docs/reliability.md. Each test kills one run again and again, the next start being the
proof of the kill before. The rollout process alone: tests/rollout/test_process.py.
"""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.config import load_config
from megatron_a3po.trainer import recovery
from megatron_a3po.trainer.batch import batch_path
from megatron_a3po.trainer.recording import read_metrics
from megatron_a3po.weights import aside
from megatron_a3po.weights.hugging_face import FORMAT as WEIGHTS_FORMAT
from megatron_a3po.weights.manifest import damage
from tests.trainer import command
from tests.trainer.held import GOES_ON, hold_before
from tests.trainer.replay import Replays, exported, identical, logs_of, without_times
from tests.trainer.task import GROUPS, Task, num_rows
from tests.trainer.test_asynchronous import repeatable

STEPS = 8
# In the order of a checkpoint: each rank's part onto the disk, the manifest, the name. The cursor of the prompts lies
# inside, so that nothing is left to be done between the name and the cursor.
BEFORE_THE_NAME = ["before_fsync", "after_fsync", "before_manifest", "before_rename"]
CHAIN = [*BEFORE_THE_NAME, "after_rename", "mid_update:3", "after_rename", "mid_update"]


def killed_at(point: str) -> Callable[[], None]:
    return lambda: os.environ.update(A3PO_KILL_AT=point)


def newest_checkpoint(run_dir: Path) -> int:
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.fixture(scope="module")
def long(replays: Replays) -> Path:
    """Enough steps to be killed in: the four batches twice."""
    folder = replays.folder / "batches-twice"
    folder.mkdir()
    for step in range(1, STEPS + 1):
        os.link(batch_path(replays.folder / "batches", (step - 1) % 4 + 1), batch_path(folder, step))
    return folder


@pytest.fixture(scope="module")
def overrides(long: Path) -> list[str]:
    return [
        f"trainer.replay={long}",
        f"trainer.steps={STEPS}",
        "trainer.save_every=2",
        "actor.num_mini_batches=2",
        "actor.tensor_model_parallel_size=2",
    ]


@pytest.fixture(scope="module")
def straight(replays: Replays, overrides: list[str]) -> tuple[Any, Any]:
    return replays.run("never-killed", *overrides)


def test_a_kill_at_each_named_point_is_followed_by_the_same_run(replays, overrides, straight) -> None:
    run_dir = replays.folder / "chain"
    argv = replays.argv("chain", *overrides)
    for number, point in enumerate(CHAIN):
        begins_after = newest_checkpoint(run_dir)
        ended = command.fork(replays.folder / "out" / "chain", *argv, before=killed_at(point)).wait()
        assert ended.code == 3, ended.output
        assert re.search(r"rank-\d \(pid \d+\) was ended by signal 9", ended.output), ended.output
        rows = [row for row in read_metrics(run_dir) if row["attempt"] == number + 1]
        assert [row["step"] for row in rows] == list(range(begins_after + 1, begins_after + 1 + len(rows)))
        saved = newest_checkpoint(run_dir) - begins_after
        assert saved == (2 if point == "after_rename" else 0), f"{point}: {saved}"
    rows, weights = replays.run("chain", *overrides)
    assert [row["attempt"] for row in rows][-1] == len(CHAIN) + 1
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert without_times(rows) == without_times(straight[0])
    assert identical(weights, straight[1])
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_a_warm_start_is_done_once(replays: Replays) -> None:
    """Killed when its checkpoint, that of step 0, has just got its name."""
    warm = [
        "warm_start={steps: 3, batch_size: 8, lr_warmup_iters: 1, lr: 1e-2}",
        "actor.data_parallel_size=2",
    ]
    straight = replays.run("warm", *warm)
    argv, run_dir = replays.argv("warm-killed", *warm), replays.folder / "warm-killed"
    ended = command.fork(replays.folder / "out" / "warm", *argv, before=killed_at("after_rename")).wait()
    assert ended.code == 3, ended.output
    assert (run_dir / "checkpoints" / "step-0").is_dir()
    done = (run_dir / "warm_start" / "metrics.jsonl").read_text()
    rows, weights = replays.run("warm-killed", *warm)
    assert (run_dir / "warm_start" / "metrics.jsonl").read_text() == done
    assert without_times(rows) == without_times(straight[0])
    assert identical(weights, straight[1])


def killed_between_the_renames(name: str) -> Callable[[], None]:
    """Of what is replaced, on a file system that cannot exchange names."""

    def before() -> None:
        aside.RENAME_EXCHANGE = 1 << 20  # which no file system knows
        rename = Path.rename

        def killed_after(self: Path, target: "str | os.PathLike[str]") -> Path:
            renamed = rename(self, target)
            if self.name == name:
                os.kill(os.getpid(), signal.SIGKILL)
            return renamed

        Path.rename = killed_after

    return before


def test_a_kill_between_the_renames_of_a_directory_of_weights(replays: Replays) -> None:
    """The export and the reference, both there already: the next start gives the old one its name again, then writes
    its own."""
    name, run_dir = "replaced", replays.folder / "replaced"
    argv = replays.argv(name, "trainer.steps=1", "actor.kl_coef=0.5")
    first = replays.run(name, *argv[3:])
    (run_dir / "summary.json").unlink()  # as if killed before it was written
    config = load_config(replays.config, argv[2:])
    for replaced in ("reference", "export"):
        ended = command.fork(
            replays.folder / "out" / name, *argv, before=killed_between_the_renames(replaced)
        ).wait()
        assert ended.code == 3, ended.output
        assert not (run_dir / replaced).exists()
        with ExitStack() as held:
            recovery.claim(config, recovery.begin(config, "auto"), held)
            assert damage(run_dir / replaced, WEIGHTS_FORMAT) is None
    again = replays.run(name, *argv[3:])
    assert without_times(again[0]) == without_times(first[0])
    assert identical(again[1], first[1])
    assert not list(run_dir.glob("*.tmp"))


STEP_OF = {"a step": 3, "a name": 4}  # in which it pauses; the checkpoint is of step 3


def pausing_before(name: str, run_dir: Path) -> Callable[[], None]:
    """The process stops by itself, as if its node were gone, as it looks whether it is fenced off: in a step, where its
    checkpoint's thread may be right before the name. A thread may run on for a moment when its process is stopped."""

    def before() -> None:
        from megatron_a3po.trainer import saving
        from megatron_a3po.trainer.attempt import Attempt

        look, looks, before_the_name = Attempt.refuse_if_fenced, iter(range(100)), threading.Event()

        def paused_look(self: Attempt) -> None:
            if threading.current_thread() is threading.main_thread() and next(looks) == STEP_OF[name] - 1:
                assert name == "a step" or before_the_name.wait()
                os.kill(os.getpid(), signal.SIGSTOP)
            look(self)

        def paused_point(point: str) -> None:
            if point == "before_rename":
                before_the_name.set()
                while not (run_dir / "attempts" / "2").exists():
                    time.sleep(0.01)

        Attempt.refuse_if_fenced = paused_look
        if name == "a name":
            saving.kill_point = paused_point

    return before


def blind_to_locks() -> None:
    """A node that sees no lock of another, as behind a partition."""
    from megatron_a3po.trainer import attempt

    attempt.fcntl.flock = lambda *_: None


def is_paused(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


@pytest.mark.parametrize("name", STEP_OF)
def test_a_lower_attempt_that_comes_back_stops_before_it_writes(replays, long: Path, name: str) -> None:
    folder = f"fenced-{name}".replace(" ", "-")
    run_dir, out = replays.folder / folder, replays.folder / "out" / folder
    few = [f"trainer.replay={long}", "trainer.steps=6", "trainer.save_every=3"]
    lower = command.fork(out, *replays.argv(folder, *few), before=pausing_before(name, run_dir))
    lower.wait_for(lambda: any(map(is_paused, lower.members())))
    assert len(read_metrics(run_dir)) == STEP_OF[name] - 1
    higher = command.fork(out, *replays.argv(folder, *few), before=blind_to_locks)
    higher.wait_for(lambda: (run_dir / "attempts" / "2").exists())
    for pid in lower.members():
        os.kill(pid, signal.SIGCONT)
    ended = lower.wait()
    assert ended.code == 3, ended.output
    assert re.search(r"attempt 1 of .* is fenced off: attempt 2 \(pid \d+ on .*\) goes on", ended.output)
    assert "Traceback" not in ended.output
    assert higher.wait().code == 0, higher.said()
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["attempt"] for row in rows} == {2}, "nothing had been saved: all is done again"
    of_lower = [
        line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"attempt": 1' in line
    ]
    assert len(of_lower) == STEP_OF[name] - 1
    assert '"attempt": 2' in (run_dir / "checkpoints/step-3/trainer.json").read_text()
    rows_alone, weights_alone = replays.run(f"{folder}-alone", *few)
    assert without_times(rows) == without_times(rows_alone)
    assert identical(exported(run_dir), weights_alone)


LIVE = ["rollout.fixed_staleness=1", "trainer.save_every=2", "actor.tensor_model_parallel_size=2"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("kills"))


def same_as_never_killed(task: Task, name: str, other: str, steps: int) -> None:
    assert task.trained(name, steps) == task.trained(other, steps)
    assert list(chain.from_iterable(task.trained(name, steps))) == list(range(steps * GROUPS))
    rows, others = (repeatable(read_metrics(task.folder / one)) for one in (name, other))
    for row in (*rows, *others):
        del row["rollout/restarts"]
    assert rows == others
    assert identical(exported(task.folder / name), exported(task.folder / other))


def test_with_generation_under_way_no_prompt_is_lost_and_none_trained_twice(task: Task) -> None:
    """Killed while it waits for samples, in an update, while it publishes, as a checkpoint gets its name; and at last
    the rollout process alone, each time that it takes its third new weights, which no next start has to mend. (Two may
    be there when it is started again, and dying twice without a step in between would end the run.)"""
    steps = 8
    task.run("whole", *LIVE, f"trainer.steps={steps}")
    for point in ("generation:2", "after_rename", "mid_publish:2", "mid_update:2"):
        ended = task.start("points", *LIVE, f"trainer.steps={steps}", before=killed_at(point)).wait()
        assert ended.code == 3, ended.output
        assert "was ended by signal 9" in ended.output
    ended = task.start("points", *LIVE, f"trainer.steps={steps}", before=killed_at("taking:3")).wait()
    assert ended.code == 0, ended.output
    rows = read_metrics(task.folder / "points")
    assert rows[-1]["attempt"] == 5
    assert sum(row["rollout/restarts"] for row in rows if row["attempt"] == 5) >= 1
    same_as_never_killed(task, "points", "whole", steps)


def test_a_rollout_process_that_always_dies_ends_the_run(task: Task) -> None:
    ended = task.start("dying", *LIVE, before=killed_at("generated")).wait()
    assert ended.code == 3, ended.output
    assert "died twice without a step in between" in " ".join(ended.output.split())
    assert read_metrics(task.folder / "dying") == []


@pytest.mark.parametrize("num_kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_random_kills(task: Task, num_kills: int) -> None:
    """Any process of the run, at any moment of it: ranks, the rollout process, a reward's, the command. Before its last
    step it waits for the last kill."""
    steps, name = 6 + 2 * num_kills, f"random-{num_kills}"
    overrides = [*LIVE, f"trainer.steps={steps}", "reward.path=tests.trainer.rewards:unhurried"]
    assert task.start(f"calm-{num_kills}", *overrides).wait(timeout_s=900).code == 0
    chance, run_dir = random.Random(num_kills), task.folder / name
    waits = hold_before(steps, always=True)
    running, starts, victims = task.start(name, *overrides, before=waits), 1, []
    while len(victims) < num_kills:
        wait_for_rows(running, run_dir, num_rows(run_dir) + chance.randrange(3), steps - 1)
        time.sleep(chance.random() / 2)
        if running.ended():
            assert running.wait().code != 0, running.said()
            running, starts = task.start(name, *overrides, before=waits), starts + 1
        elif members := sorted(running.members()):
            with contextlib.suppress(OSError):  # it ended by itself
                victim = chance.choice(members)
                kind = kind_of(victim, running)
                os.kill(victim, signal.SIGKILL)
                victims.append(kind)
    (run_dir / GOES_ON).touch()
    if running.wait(timeout_s=900).code != 0:
        starts += 1
        assert task.start(name, *overrides).wait(timeout_s=900).code == 0
    print(f"{num_kills} kills: {victims}; {starts} starts, {num_rows(run_dir) - steps} steps taken again")
    same_as_never_killed(task, name, f"calm-{num_kills}", steps)
    assert not logs_of(run_dir).count("is damaged")


def wait_for_rows(running: command.Command, run_dir: Path, wanted: int, last: int) -> None:
    """So many rows, or that of the last step before the run waits."""
    while not running.ended() and num_rows(run_dir) < wanted:
        if any(row["step"] == last for row in read_metrics(run_dir)):
            return
        time.sleep(0.02)


def kind_of(pid: int, running: command.Command) -> str:
    if pid == running.pid:
        return "command"
    said = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    modules = [word.decode().rpartition(".")[2] for word in said if word.startswith(b"megatron_a3po.")]
    return {"process": "rollout process", "worker": "reward"}.get((modules or ["rank"])[0], "rank")
