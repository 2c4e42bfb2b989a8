"""Signals at awkward moments: before torch is imported, and in the warm start, which has no checkpoint."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.lifetime import StopWish
from megatron_a3po.trainer import worker
from tests.trainer import command
from tests.trainer.replay import Replays, identical, without_times
from tests.trainer.test_resume import num_rows

WARM_START = ["warm_start={steps: 60, batch_size: 4, lr_warmup_iters: 4}", "trainer.steps=2"]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_torch_is_there_is_a_stop(replays: Replays, number: signal.Signals) -> None:
    name = f"early-{number.name}"
    running = command.spawn(replays.folder / "out" / name, *replays.argv(name))
    running.wait_for(lambda: catches(running.pid, number))
    assert "libtorch" not in Path(f"/proc/{running.pid}/maps").read_text()
    running.signal(number)
    ended = running.wait()
    assert ended.code == 75, ended.output
    assert "run again to continue" in ended.output
    assert "Traceback" not in ended.output
    assert len(replays.run(name)[0]) == 1


def test_a_second_interrupt_before_torch_is_there_ends_it_at_once(replays: Replays) -> None:
    running = command.spawn(replays.folder / "out" / "early-interrupts", *replays.argv("early-interrupts"))
    running.wait_for(lambda: catches(running.pid, signal.SIGTERM))
    running.signal(signal.SIGINT)
    # Two signals that arrive while a library is being loaded, one long call, are one.
    running.wait_for(lambda: "ctrl-C again ends the run at once" in running.said())
    running.signal(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output


def hold_the_warm_start() -> None:
    """Its third step waits to be told to stop."""
    steps = worker.warm_start
    wishes: list[StopWish] = []
    listening = StopWish.listening

    def heard() -> StopWish:
        wishes.append(listening())
        return wishes[0]

    def held(*arguments: Any) -> Iterator[Any]:
        for step, metrics in steps(*arguments):
            yield step, metrics
            while step == 3 and not wishes[0].wished:
                time.sleep(0.02)

    worker.warm_start, StopWish.listening = held, heard


def test_a_run_stopped_in_its_warm_start_begins_it_anew(replays: Replays) -> None:
    straight_rows, straight_weights = replays.run("warm-straight", *WARM_START)
    warm_start = replays.folder / "warm-stopped" / "warm_start"
    argv = replays.argv("warm-stopped", *WARM_START)
    running = command.fork(replays.folder / "out" / "warm-stopped", *argv, before=hold_the_warm_start)
    running.wait_for(lambda: num_rows(warm_start) >= 3)
    running.signal(signal.SIGUSR1)
    ended = running.wait()
    assert ended.code == 75, ended.output
    assert "stopped in the warm start, which has no checkpoint" in ended.output
    assert 3 <= num_rows(warm_start) < 60
    rows, weights = replays.run("warm-stopped", *WARM_START)
    assert without_times(rows) == without_times(straight_rows)
    assert identical(weights, straight_weights)
