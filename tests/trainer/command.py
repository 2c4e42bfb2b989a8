"""The production command as a test runs it: `main(argv)` in a fork of this process, or the real thing in a process
of its own. Either way it leads a session, so that whatever it leaves behind can be found by the session's number.

A fork has torch and Megatron-Core imported already, so that a run of a few steps costs seconds.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_a3po.trainer.worker  # noqa: F401  imported here, so that a fork has it
from megatron_a3po.__main__ import main
from megatron_a3po.logs import set_up_logs  # noqa: F401

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent.parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")
PATIENCE_S = 900.0  # on a busy machine; what is waited for comes in seconds
LEFT_BEHIND_S = 60.0  # the rollout process looks for its parent once a second


@dataclass
class Ended:
    """How a command ended, and everything it said."""

    code: int
    output: str


class Command:
    """A running command. Made by `fork` or `spawn`; `wait` ends it one way or another."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output
        self._status: int | None = None

    def ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Until `condition` holds; an AssertionError with the command's output if it ends or hangs before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not self.ended(), f"ended too early:\n{self.said()}"
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"waited in vain:\n{self.said()}")
            time.sleep(0.02)

    def wait(self, timeout_s: float = PATIENCE_S) -> Ended:
        """Its end; nothing of it may still run then."""
        deadline = time.monotonic() + timeout_s
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.02)
        timed_out = not self.ended()
        if timed_out:
            self.end()
        assert not timed_out, f"not done after {timeout_s} s:\n{self.said()}"
        left = self.left_behind()
        assert not left, f"left behind: {left}\n{self.said()}"
        assert self._status is not None
        return Ended(os.waitstatus_to_exitcode(self._status), self.said())

    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def members(self) -> list[int]:
        """The processes of its session that are no zombies."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.pid and fields[0] not in "ZX":
                    found.append(int(entry.name))
        return found

    def left_behind(self) -> list[int]:
        """Who is still there a little after the end; ends them."""
        deadline = time.monotonic() + LEFT_BEHIND_S
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.end()
        return left

    def end(self) -> None:
        """End it and all its processes, by their ids."""
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]


def fork(folder: Path, *argv: str, before: Callable[[], None] | None = None) -> Command:
    """`main(argv)` in a fork of this process; its output goes into a file in `folder`.

    before: called in the fork first, so that what it replaces is replaced for this command and its ranks alone.
    """
    output = _output(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any thread in the parent
        pid = os.fork()
    if pid == 0:
        _be_the_command(output, argv, before)
    return Command(pid, output)


def spawn(folder: Path, *argv: str, program: tuple[str, ...] = ("-m", "megatron_a3po")) -> Command:
    """The real command in an interpreter of its own."""
    output = _output(folder)
    inherited = {name: text for name, text in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *program, *argv],
            env=inherited | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    process.returncode = 0  # waited for by id
    return Command(process.pid, output)


def run(folder: Path, *argv: str, timeout_s: float = PATIENCE_S) -> Ended:
    """A forked command from start to end."""
    return fork(folder, *argv).wait(timeout_s)


def _output(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"output-{len(list(folder.glob('output-*')))}.txt"


def _be_the_command(output: Path, argv: tuple[str, ...], before: Callable[[], None] | None) -> None:
    code = 1
    try:
        os.setsid()
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        warnings.resetwarnings()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        if before is not None:
            before()
        code = main(list(argv))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
