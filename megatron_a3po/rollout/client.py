"""What trainer rank 0 holds of the rollouts: it starts the rollout process and talks to it.

Every call becomes a message; a thread reads the answers. Whatever ends the process ends every call that waits, and
every later one, with its error: RewardError, InputError or RolloutError, the remote traceback in the text. No torch
here. The other side is `process.py`.
"""

import contextlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from megatron_a3po import errors
from megatron_a3po.config import Config
from megatron_a3po.environment import child_environment
from megatron_a3po.errors import A3POError, RolloutError, ServersGone
from megatron_a3po.rollout.messages import Answer, Failure, Request, Start, Stop
from megatron_a3po.rollout.trajectory import Evaluation, RolloutBatch, Trajectory

STOP_TIMEOUT_S = 10.0
LAST_LINES = 20

# The errors that mean the same on both sides; anything else is a failure of the rollout process.
KNOWN: Mapping[str, type[A3POError]] = {
    name: getattr(errors, name) for name in ("ConfigError", "InputError", "RewardError")
}


class RolloutClient:
    """Made by `start`. Calls may come from any thread."""

    def __init__(self, process: "subprocess.Popen[bytes]", connection: Connection, log: Path) -> None:
        self._process = process
        self._connection = connection
        self._log = log
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Any]] = {}
        self._error: A3POError | None = None
        self._stopping = False
        self._batch: tuple[int, Future[RolloutBatch]] | None = None
        self._num_batches = 0
        self._reader = threading.Thread(target=self._read, name="rollout-answers", daemon=True)
        self._reader.start()

    @classmethod
    def start(
        cls,
        config: Config,
        run_dir: Path,
        state: dict[str, Any] | None,
        first_version: int,
        weights_dir: Path,
    ) -> "RolloutClient":
        """Start the process, which begins to generate with the weights of `weights_dir` as `first_version`. `state` is
        what `state` returned in the run that is resumed."""
        log = Path(run_dir) / "logs" / "rollout.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = cast("tuple[Connection, Connection]", multiprocessing.Pipe())
        arguments = ["-m", "megatron_a3po.rollout.process", str(theirs.fileno()), str(os.getpid())]
        variables = child_environment(
            OMP_NUM_THREADS=str(config.rollout.num_threads),
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
        client = cls(process, ours, log)
        client._send(Start(config, Path(run_dir), state, first_version, Path(weights_dir)))
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    def publish(self, version: int, directory: Path) -> "Future[None]":
        """Announce new weights; never waits. The engine takes the newest it knows of; under `fixed_staleness` it takes
        each in turn. The directory may be removed once the future is done, or a newer version is announced (not under
        `fixed_staleness`)."""
        return self._call("publish", version, Path(directory))

    def next_batch(self, current_version: int, timeout_s: float | None = None) -> RolloutBatch:
        """Wait for the batch of the step that begins with `current_version`. After a TimeoutError call it again: the
        batch that was asked for is still being waited for."""
        if self._batch is None:
            self._batch = (current_version, self._call("next_batch", current_version))
        version, future = self._batch
        assert version == current_version, (
            f"asked for the batch of {current_version} while {version} is on its way"
        )
        batch = future.result(timeout_s)
        self._batch = None
        self._num_batches += 1
        return batch

    def evaluate(self, version: int, limit: int | None = None) -> "Future[Evaluation]":
        """Greedy accuracy on the held-out prompts (the first `limit`) with `version`, or a newer one if the engine has
        passed it; rollouts go on meanwhile."""
        return self._call("evaluate", version, limit)

    def probe(self, version: int, prompt_index: int = 0) -> "Future[Trajectory]":
        """A greedy response to a training prompt with tokens of one version, to compare sampler and trainer."""
        return self._call("probe", version, prompt_index)

    def canary(self, version: int) -> "Future[dict[str, Trajectory]]":
        """From each vLLM server, by its URL, a response whose tokens are of `version`."""
        return self._call("canary", version)

    def state(self) -> "Future[dict[str, Any]]":
        """What a checkpoint keeps of the rollouts. Call it between two `next_batch`es, also after a timeout."""
        return self._call("state", self._num_batches)

    def sampled_between(self, start: float, end: float) -> int:
        """Number of training tokens sampled in an interval of `time.monotonic`."""
        return self._call("sampled_between", start, end).result()

    def stop(self) -> None:
        """End the process; by force if it does not follow."""
        self._stopping = True
        self._send(Stop())
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._connection.close()

    def _call(self, method: str, *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._error is not None:
                raise self._error
            self._pending[number] = future
        self._send(Request(number, method, arguments))
        return future

    def _send(self, message: object) -> None:
        # The reader sees a closed connection too, and says what it was.
        with contextlib.suppress(OSError), self._lock:
            self._connection.send(message)

    def _read(self) -> None:
        failure = None
        while failure is None:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            match message:
                case Answer(number, value):
                    with self._lock:
                        future = self._pending.pop(number)
                    if isinstance(value, ServersGone):
                        future.set_exception(value)
                    else:
                        future.set_result(value)
                case Failure():
                    failure = message
        error = self._ended(failure)
        with self._lock:
            self._error = error
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(error)

    def _ended(self, failure: Failure | None) -> A3POError:
        if failure is not None and failure.error in KNOWN:
            return KNOWN[failure.error](failure.text)
        if failure is not None:
            return RolloutError(f"the rollout process (pid {self.pid}) failed:\n{failure.text}")
        if self._stopping:
            return RolloutError("the rollout process was stopped.")
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return RolloutError(
            f"the rollout process (pid {self.pid}) ended with exit code {code}; the end of {self._log}:\n"
            + "\n".join(lines)
        )
