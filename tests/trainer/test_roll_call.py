"""A rank that the others wait for in vain is named, and the run ends: with code 3, under a launcher with 70."""

import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_a3po.actor.roll_call import RollCall
from megatron_a3po.trainer import loop
from tests.trainer import command
from tests.trainer.command import Command
from tests.trainer.hung import hang
from tests.trainer.replay import Replays, logs_of

LIMIT_S = 14


@pytest.mark.parametrize("how", ["stopped", "elsewhere"])
def test_the_rank_that_does_not_come_is_named(replays: Replays, how: str) -> None:
    name = f"hangs-{how}"
    run_dir = replays.folder / name
    argv = replays.argv(
        name,
        "trainer.steps=4",
        "actor.data_parallel_size=2",
        f"distributed.timeout_s={LIMIT_S}",
    )
    running = command.fork(
        replays.folder / "out" / name, *argv, before=stay_away if how == "elsewhere" else None
    )
    if how == "stopped":
        running.wait_for(lambda: (run_dir / "metrics.jsonl").is_file())
        os.kill(pid_of(running, run_dir / "logs" / "rank-1.log"), signal.SIGSTOP)
    ended = running.wait()
    assert ended.code == 3, ended.output + logs_of(run_dir)
    assert f"distributed.timeout_s={LIMIT_S}" in ended.output
    assert "rank 1, which did not arrive" in ended.output
    if how == "stopped":
        assert "does not answer" in ended.output
    else:
        assert "rank 1 is in train (loop.py:" in ended.output
    assert "rank 0 is in" not in ended.output
    assert "Traceback" not in ended.output


def test_the_rank_that_holds_the_store_is_named(replays: Replays) -> None:
    """As under torchrun and srun: a look into the store does not come back from rank 0."""
    argv = replays.argv(
        "hangs-holder", "trainer.steps=4", "actor.data_parallel_size=2", f"distributed.timeout_s={LIMIT_S}"
    )
    port = free_port()
    first, second = (
        command.fork(replays.folder / "out" / f"holder-{rank}", *argv, before=partial(one_of_two, rank, port))
        for rank in range(2)
    )
    try:
        ended = second.wait()
    finally:
        first.end()
    assert ended.code == 70, ended.output + logs_of(replays.folder / "hangs-holder")
    assert f"distributed.timeout_s={LIMIT_S} allows for rank 0, which holds" in ended.output
    assert "Traceback" not in ended.output


def test_a_rank_that_never_starts_is_named(replays: Replays) -> None:
    argv = replays.argv("absent", "actor.data_parallel_size=2", "distributed.timeout_s=10")
    ended = command.fork(replays.folder / "out" / "absent", *argv, before=first_of_two_by_srun).wait()
    assert ended.code == 70, ended.output
    assert "distributed.timeout_s=10 allows for those that did not start: rank 1\n" in ended.output
    assert "Traceback" not in ended.output


def first_of_two_by_srun() -> None:
    os.environ |= {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    os.environ |= {"SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_of_two(rank: int, port: int) -> None:
    """What a launcher sets; rank 0 stops before its second step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    hang(0, 2)


def stay_away() -> None:
    """Rank 1 finds something else to do before its second step."""
    align = loop.align

    def away(batch: Any, *sections: Any) -> Any:
        if dist.get_rank() == 1 and "second" in seen:
            while True:
                time.sleep(0.05)
        seen.add("second")
        return align(batch, *sections)

    seen: set[str] = set()
    loop.align = away


def pid_of(running: Command, log: Path) -> int:
    """The rank that writes this log."""
    for pid in running.members():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.path.realpath(link) == str(log):
                return pid
    raise AssertionError(f"nobody writes {log}")


def test_nobody_is_named_where_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_a3po.actor.roll_call.own_connection", lambda *_: None)
    call = RollCall(0, 3, 600)
    waits, works = {"waits": True, "where": "a"}, {"waits": False, "where": "b (c.py:1)"}
    assert call.verdict({0: works, 1: works, 2: works}) is None
    assert "rank 2, which did not arrive: rank 2 is in b (c.py:1)" in str(
        call.verdict({0: waits, 1: waits, 2: works})
    )
    assert "ranks 1, 2, which did not arrive and do not answer" in str(call.verdict({0: waits}))
    assert "for one another: rank 0 is in a; rank 1" in str(call.verdict({0: waits, 1: waits, 2: waits}))
