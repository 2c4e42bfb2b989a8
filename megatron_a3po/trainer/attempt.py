"""Attempts: every start of a run has a number of its own, and the highest number is the run's one writer.

The lock on a run directory keeps a second start away where both see it. A node that lost its network does not, and
what runs there may go on while the run is continued elsewhere. So each start takes the next number, by making a file
that cannot be made twice, and whoever finds a higher one than its own stops before it writes anything more. What an
attempt writes meanwhile lies under its number (published weights, unfinished checkpoints), so that two of them never
write the same file. Next: `recovery.py`, which decides what an attempt goes on from.
"""

import fcntl
import json
import logging
import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_a3po.environment import node_name
from megatron_a3po.errors import ConfigError, FencedError
from megatron_a3po.weights.aside import write_aside

logger = logging.getLogger(__name__)
FOLDER = "attempts"  # <n>: who made attempt n, and when
NEWEST = "attempt"  # its number
MOMENTS, MOMENT_S = 20, 0.05


@dataclass(frozen=True)
class Attempt:
    """This start's number in a run directory. Made by `take`."""

    run_dir: Path
    number: int

    @classmethod
    def take(cls, run_dir: Path) -> "Attempt":
        """The next number: nobody else gets it, whatever locks are worth there."""
        (run_dir / FOLDER).mkdir(exist_ok=True)
        number = newest_attempt(run_dir) + 1
        while not _make(run_dir / FOLDER / str(number)):
            number += 1
        write_aside(run_dir / NEWEST, str(number))
        return cls(run_dir, number)

    def refuse_if_fenced(self) -> None:
        """Errors: FencedError where a later start has taken the run over."""
        if (newest := newest_attempt(self.run_dir)) > self.number:
            raise FencedError(
                f"attempt {self.number} of {self.run_dir} is fenced off: attempt {newest}"
                f"{_of(self.run_dir / FOLDER / str(newest))} goes on with this run, and this one writes nothing more; "
                "see that its other processes are gone"
            )


def newest_attempt(run_dir: Path) -> int:
    """The highest number any start of this run has, 0 before the first."""
    # Reading the file asks a network file system anew, where the list of a folder may be a minute old.
    found = [int(name) for name in _names(run_dir / FOLDER) if name.isdecimal()]
    if (run_dir / NEWEST).is_file():
        written = (run_dir / NEWEST).read_text(errors="replace")
        found += [int(written)] if written.isdecimal() else []  # a power failure may have emptied it
    return max(found, default=0)


def lock(run_dir: Path, held: ExitStack) -> None:
    """Keep other starts away from a run directory for as long as `held` lasts, where the file system has locks.

    Errors: ConfigError where another start has it.
    """
    try:
        file = held.enter_context((run_dir / "lock").open("a+"))
    except OSError as error:
        raise ConfigError(
            f"run_dir is {run_dir}, but nothing can be written there ({error.strerror})"
        ) from None
    try:
        _lock_in_time(file)
    except BlockingIOError:
        file.seek(0)
        raise ConfigError(
            f"run_dir is {run_dir}, where a run is under way (pid {file.read().strip()}); give another run_dir=..."
        ) from None
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): see that no other start has this run; of two the later fences the earlier off",
            run_dir,
            error.strerror,
        )
    file.truncate(0)
    file.write(f"{os.getpid()} on {node_name()}")
    file.flush()


def _lock_in_time(file: IO[str]) -> None:
    """`report` holds the lock for the moment in which it asks whether a run is under way."""
    for _ in range(MOMENTS):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(MOMENT_S)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _make(file: Path) -> bool:
    """False where it is there already."""
    try:
        with file.open("x") as opened:
            json.dump({"node": node_name(), "pid": os.getpid(), "begun": time.time_ns()}, opened)
    except FileExistsError:
        return False
    return True


def _of(file: Path) -> str:
    try:
        who = json.loads(file.read_text())
        return f" (pid {who['pid']} on {who['node']})"
    except (OSError, ValueError):  # half written, or not seen here yet
        return ""


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
