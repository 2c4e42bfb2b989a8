"""The rollout process as its parent sees it: started, spoken to over one socket, ended. `client.py` has the calls.

Two threads of its own write and read; when nothing more comes, the reading one says how the process ended. No torch
here. The other side is `process.py`.
"""

import contextlib
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

from megatron_a3po.environment import child_environment
from megatron_a3po.rollout.messages import Answer, Failure, Request, Start, Stop

STOP_TIMEOUT_S = 10.0
LAST_LINES = 20


class RolloutChild:
    """One rollout process. `answered` and `ended` are called from its reading thread; `ended` last, with the failure
    that the process told of, if it could."""

    def __init__(
        self,
        start: Start,
        answered: Callable[[Answer], None],
        ended: Callable[["RolloutChild", Failure | None], None],
    ) -> None:
        self._answered, self._ended = answered, ended
        self.log = start.run_dir / "logs" / "rollout.log"
        self._connection, self._process = _spawn(start, self.log)
        # Whoever sends never waits: the process reads nothing before it has imported torch.
        self._outbox: queue.SimpleQueue[Start | Request | Stop] = queue.SimpleQueue()
        self.send(start)
        self._writer = threading.Thread(target=self._write, name="rollout-requests", daemon=True)
        self._reader = threading.Thread(target=self._read, name="rollout-answers", daemon=True)
        self._writer.start()
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Start | Request | Stop) -> None:
        self._outbox.put(message)

    def stop(self) -> None:
        """End the process; by force if it does not follow."""
        self.send(Stop())
        self._wait()
        self._reader.join()
        self._writer.join()
        self._connection.close()

    def _wait(self) -> None:
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def how_it_ended(self) -> str:
        """In words, of a process that said nothing itself."""
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return f"{how}; the end of {self.log}:\n" + "\n".join(lines)

    def _write(self) -> None:
        message = None
        # The reader sees a closed connection too, and says what it was.
        with contextlib.suppress(OSError):
            while not isinstance(message, Stop):
                message = self._outbox.get()
                self._connection.send(message)

    def _read(self) -> None:
        failure = None
        while failure is None:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            match message:
                case Answer():
                    self._answered(message)
                case Failure():
                    failure = message
        self._outbox.put(Stop())  # nobody reads any more
        self._wait()
        self._ended(self, failure)


def _spawn(start: Start, log: Path) -> "tuple[Connection, subprocess.Popen[bytes]]":
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = cast("tuple[Connection, Connection]", multiprocessing.Pipe())
    arguments = ["-m", "megatron_a3po.rollout.process", str(theirs.fileno()), str(os.getpid())]
    variables = child_environment(
        OMP_NUM_THREADS=str(start.config.rollout.num_threads),
        # What can be imported here can be imported there: the package itself, and a reward function's module.
        PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
    )
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
        )
    theirs.close()
    return ours, process
