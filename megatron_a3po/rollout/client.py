"""What trainer rank 0 holds of the rollouts: it starts the rollout process and talks to it, and starts it again.

Every call becomes a message; a thread reads the answers. A process that dies is started anew where the ledger knows it
was, and asked again what it had not answered. What it says itself that it cannot go on from, and a second death in one
step, end every call that waits, and every later one, with an error: one of KNOWN, or a RolloutError with the
remote traceback in its text. No torch here. The process is `child.py`'s, what is known of it `ledger.py`'s.
"""

import itertools
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_a3po import errors
from megatron_a3po.config import Config
from megatron_a3po.errors import A3POError, RolloutError, ServersGone
from megatron_a3po.rollout.child import RolloutChild
from megatron_a3po.rollout.ledger import Ledger
from megatron_a3po.rollout.messages import Answer, Failure, Request, Start
from megatron_a3po.rollout.spans import Span
from megatron_a3po.rollout.trajectory import Evaluation, RolloutBatch, Trajectory

logger = logging.getLogger(__name__)

# The errors that mean the same on both sides.
KNOWN: Mapping[str, type[A3POError]] = {
    name: getattr(errors, name) for name in ("ConfigError", "InputError", "RewardError", "FencedError")
}


@dataclass
class Asked:
    """A request whose answer is awaited."""

    request: Request
    future: Future[Any] = field(default_factory=Future)
    steps: int = 0  # batches that had reached the trainer
    again: bool = False  # of another process than the one first asked


class RolloutClient:
    """Made by `start`. Calls may come from any thread."""

    def __init__(self, start: Start) -> None:
        self._ledger = Ledger(start)
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._pending: dict[int, Asked] = {}
        self._error: A3POError | None = None
        self._stopping = False
        self._batch: tuple[int, Future[RolloutBatch]] | None = None
        self._remembering: Future[Any] | None = None
        self._step = start.first_version  # the version that the step under way begins with
        self._died_in: int | None = None  # such a step
        self._num_restarts = 0  # since the latest batch
        self._born_after = start.consumed_steps  # batches, when the process was started
        self._child = RolloutChild(start, self._answered, self._ended)

    @classmethod
    def start(
        cls,
        config: Config,
        run_dir: Path,
        state: dict[str, Any] | None,
        first_version: int,
        weights_dir: Path,
        *,
        attempt: int = 1,
    ) -> "RolloutClient":
        """Start the process, which begins to generate with the weights of `weights_dir` as `first_version`. `state` is
        what `state` returned in the run that is resumed."""
        run_dir, weights_dir = Path(run_dir), Path(weights_dir)
        return cls(Start(config, run_dir, attempt, state, first_version, weights_dir, first_version))

    @property
    def pid(self) -> int:
        return self._child.pid

    def publish(self, version: int, directory: Path) -> "Future[None]":
        """Announce new weights; never waits. The engine takes the newest it knows of; under `fixed_staleness` it takes
        each in turn. The directory may be removed once the future is done, or a newer version is announced (not under
        `fixed_staleness`)."""
        with self._lock:
            self._ledger.publish(version, Path(directory))
            return self._call("publish", version, Path(directory))

    def next_batch(self, current_version: int, timeout_s: float | None = None) -> RolloutBatch:
        """Wait for the batch of the step that begins with `current_version`. After a TimeoutError call it again: the
        batch that was asked for is still being waited for."""
        if self._batch is None:
            self._step = current_version
            self._batch = (current_version, self._call("next_batch", current_version))
        while True:
            version, future = self._batch
            assert version == current_version, (
                f"asked for the batch of {current_version} while {version} is on its way"
            )
            batch = future.result(timeout_s)
            with self._lock:
                if self._batch[1] is future:  # no other process has been asked for it meanwhile
                    self._batch = None
                    return self._received(batch)

    def evaluate(self, version: int) -> "Future[Evaluation]":
        """Greedy accuracy on the held-out prompts with `version`, or a newer one if the engine has passed it; rollouts
        go on meanwhile."""
        return self._call("evaluate", version)

    def probe(self, version: int, prompt_index: int = 0) -> "Future[Trajectory]":
        """A greedy response to a training prompt with tokens of one version, to compare sampler and trainer."""
        return self._call("probe", version, prompt_index)

    def canary(self, version: int) -> "Future[dict[str, Trajectory]]":
        """From each vLLM server, by its URL, a response whose tokens are of `version`."""
        return self._call("canary", version)

    def state(self) -> "Future[dict[str, Any]]":
        """What a checkpoint keeps of the rollouts. Call it between two `next_batch`es, also after a timeout."""
        with self._lock:
            steps = self._ledger.consumed_steps
            future = self._call("state", steps - self._born_after)
        future.add_done_callback(lambda done: self._remember(done, steps))
        return future

    def num_filtered(self) -> "Future[int]":
        """Groups without signal since the last batch, which no batch tells of while none comes together."""
        return self._call("num_filtered")

    def sampled_between(self, start: float, end: float) -> int:
        """Number of training tokens sampled in an interval of `time.monotonic`."""
        return self._call("sampled_between", start, end).result()

    def spans(self, start: float, end: float) -> list[Span]:
        """What the rollout process and its engine did in such an interval."""
        return self._call("spans", start, end).result()

    def stop(self) -> None:
        """End the process; by force if it does not follow."""
        with self._lock:
            self._stopping = True
        self._child.stop()

    def _received(self, batch: RolloutBatch) -> RolloutBatch:
        self._ledger.consume(batch)
        restarts, self._num_restarts = self._num_restarts, 0
        if self._remembering is None or self._remembering.done():
            self._remembering = self.state()
        return replace(batch, statistics=batch.statistics | {"rollout/restarts": float(restarts)})

    def _remember(self, state: "Future[dict[str, Any]]", steps: int) -> None:
        if state.exception() is None:
            with self._lock:
                self._ledger.remember(state.result(), steps)

    def _call(self, method: str, *arguments: Any) -> "Future[Any]":
        with self._lock:
            if self._error is not None:
                raise self._error
            asked = Asked(Request(next(self._numbers), method, arguments), steps=self._ledger.consumed_steps)
            self._pending[asked.request.number] = asked
            self._child.send(asked.request)
        return asked.future

    def _answered(self, answer: Answer) -> None:
        with self._lock:
            asked, value = self._pending.pop(answer.number), answer.value
            if asked.again and asked.request.method == "state":
                value = self._ledger.as_of(asked.steps, value)
        if isinstance(value, ServersGone):
            asked.future.set_exception(value)
        else:
            asked.future.set_result(value)

    def _ended(self, child: RolloutChild, failure: Failure | None) -> None:
        """A process has ended: start another, or end every call."""
        with self._lock:
            error = self._why(child, failure)
            if not (self._stopping or self._is_final(failure) or self._died_in == self._step):
                logger.warning("%s\nIt is started again.", error)
                self._died_in = self._step
                self._num_restarts += 1
                self._restart()
                return
            self._error = error
            pending, self._pending = self._pending, {}
        for asked in pending.values():
            asked.future.set_exception(error)

    def _restart(self) -> None:
        """Another process where the ledger knows the last one was, asked again what that had not answered."""
        start, publications = self._ledger.restart()
        self._born_after = start.consumed_steps
        self._child = RolloutChild(start, self._answered, self._ended)
        waiting, self._pending = self._pending, {}
        if self._batch and self._batch[1].done():  # given by the old process, but not taken: made again
            self._batch = (self._batch[0], self._call("next_batch", self._batch[0]))
        announced = [
            asked.request.arguments[0] for asked in waiting.values() if asked.request.method == "publish"
        ]
        for version, directory in publications:
            if version < min(announced, default=version + 1):
                self._call("publish", version, directory)
        for number, asked in sorted(waiting.items()):
            method, arguments = asked.request.method, asked.request.arguments
            if method == "publish" and arguments[0] < start.first_version:
                asked.future.set_result(None)  # it starts with newer ones
                continue
            if method == "state":
                asked.request, asked.again = Request(number, method, (0,)), True
            self._pending[number] = asked
            self._child.send(asked.request)

    def _is_final(self, failure: Failure | None) -> bool:
        """Whether the process has said what a new one would say again."""
        kind = getattr(errors, failure.error, None) if failure else None
        return isinstance(kind, type) and issubclass(kind, A3POError)

    def _why(self, child: RolloutChild, failure: Failure | None) -> A3POError:
        if failure is not None and failure.error in KNOWN:
            return KNOWN[failure.error](failure.text)
        if failure is not None:
            return RolloutError(f"the rollout process (pid {child.pid}) failed:\n{failure.text}")
        if self._stopping:
            return RolloutError("the rollout process was stopped.")
        twice = "died twice without a step in between: at last it " if self._died_in == self._step else ""
        return RolloutError(f"the rollout process (pid {child.pid}) {twice}{child.how_it_ended()}")
