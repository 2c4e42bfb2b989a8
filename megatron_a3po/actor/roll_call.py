"""Who did not come: a rank that the others wait for in vain is named, and the run ends, instead of standing still.

A thread on every rank looks at where its main thread is. One that has been in one and the same call for the time limit
calls the roll through the process group's store, and every thread answers, whatever its main thread does. A rank that
is stopped, or whose machine is gone, does not answer; one that does something else while others wait for it says what.
Either is named, and every rank that is left ends as if it had crashed. Where nobody waits for another (a step may take
long) nothing happens. It asks nothing of the backend: gloo and NCCL differ only in what a main thread waits in.
The store itself may be what does not answer: over TCP rank 0 holds it, which is then the one to name.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_a3po.actor.store import own_connection, within
from megatron_a3po.environment import node_name
from megatron_a3po.errors import EXIT_CRASHED

logger = logging.getLogger(__name__)
POLL_S = 1.0
PACKAGE = str(Path(__file__).parents[1])
# Where Python waits for other ranks. A wait that begins elsewhere shows in the rank that does not answer.
WAITS = (str(Path(dist.__file__).parent), "p2p_communication.py")


class RollCall:
    """Started with `with`; its thread watches the thread that made it."""

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.poll_s = min(POLL_S, timeout_s / 5)
        self.window_s = min(30.0, max(5.0, timeout_s / 4))
        self.ask_s = self.window_s / 4  # for a look into the store
        # So that what is found is said in time.
        self.patience_s = max(timeout_s / 2, timeout_s - self.window_s - self.ask_s)
        self._store = own_connection("roll-call", self.window_s)
        self._watched = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="roll-call", daemon=True)
        self._call: Any = None
        self._wait: FrameType | None = None
        self._in_call_since = self._waits_since = time.monotonic()

    def __enter__(self) -> "RollCall":
        if self.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._wait = None

    def _watch(self) -> None:
        number, before = 0, time.monotonic()
        while not self._done.wait(self.poll_s):
            now = time.monotonic()
            if now - before > self.poll_s + self.window_s / 2:  # it was itself stopped meanwhile
                self._in_call_since = self._waits_since = now
            before = now
            self._look(now)
            is_silent = now - self._in_call_since > self.patience_s
            if is_silent or self._is_called(number):
                answers = self._answers(number)
                if answers is None and not self._answer()["waits"]:
                    continue
                if not self._done.is_set() and (sentence := self.verdict(answers)):
                    self._end(number, sentence, answers)
                number, self._in_call_since = number + 1, time.monotonic()

    def _look(self, now: float) -> None:
        """Where the main thread is, and since when."""
        frame = sys._current_frames().get(self._watched)
        call = None if frame is None else (id(frame), frame.f_lasti, frame.f_code)
        if call != self._call:
            self._call, self._in_call_since = call, now
        wait = next((one for one in _stack(frame) if _is_wait(one)), None)
        if wait is not self._wait:
            self._wait, self._waits_since = wait, now

    def _is_called(self, number: int) -> bool:
        try:
            return within(self.ask_s, lambda: self._store.check([f"roll-call/{number}"]))
        except (RuntimeError, TimeoutError):  # its holder does not answer, which shows when somebody waits
            return False

    def _answers(self, number: int) -> dict[int, dict[str, Any]] | None:
        """By rank, of all that answered in time; None where the store does not answer."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.window_s

        def look() -> None:
            for rank in set(range(self.world_size)) - answers.keys():
                if self._store.check([f"here/{number}/{rank}"]):
                    answers[rank] = json.loads(self._store.get(f"here/{number}/{rank}"))

        def call() -> None:
            self._store.set(f"roll-call/{number}", str(self.rank))
            self._store.set(f"here/{number}/{self.rank}", json.dumps(self._answer()))

        try:
            within(self.window_s, call)
            while len(answers) < self.world_size and time.monotonic() < deadline and not self._done.is_set():
                within(self.window_s, look)
                self._done.wait(self.poll_s / 4)
        except (RuntimeError, TimeoutError):
            return None
        return answers

    def _answer(self) -> dict[str, Any]:
        own = next(
            (
                one
                for one in _stack(sys._current_frames().get(self._watched))
                if one.f_code.co_filename.startswith(PACKAGE)
            ),
            None,
        )
        waits = self._wait is not None and time.monotonic() - self._waits_since > self.patience_s / 2
        return {
            "where": f"{own.f_code.co_name} ({Path(own.f_code.co_filename).name}:{own.f_lineno})"
            if own
            else "?",
            "waits": waits,
            "pid": os.getpid(),
            "node": node_name(),
        }

    def verdict(self, answers: Mapping[int, dict[str, Any]] | None) -> str | None:
        """One sentence that names the ranks to look at; None where nobody waits for another."""
        limit = f"as long as distributed.timeout_s={self.timeout_s:g} allows"
        if answers is None:
            return (
                f"the ranks have waited {limit} for rank 0, which holds the process group's store and does not answer: "
                "stopped, or its machine is gone"
            )
        if missing := sorted(set(range(self.world_size)) - answers.keys()):
            return (
                f"the ranks have waited {limit} for {_listed(missing)}, which did not arrive and "
                f"{'does' if len(missing) == 1 else 'do'} not answer: stopped, or its machine is gone"
            )
        waiting = [rank for rank, answer in answers.items() if answer["waits"]]
        if not waiting:
            return None
        elsewhere = sorted(answers.keys() - set(waiting))
        places = "; ".join(
            f"rank {rank} is in {answers[rank]['where']}" for rank in elsewhere or sorted(answers)
        )
        whom = f"{_listed(elsewhere)}, which did not arrive" if elsewhere else "one another"
        return f"the ranks have waited {limit} for {whom}: {places}"

    def _end(self, number: int, sentence: str, answers: Mapping[int, dict[str, Any]] | None) -> None:
        logger.critical("%s", sentence)
        said = f"said/{number}"
        try:
            if answers is None or self.rank == min(answers, default=self.rank):
                sys.stderr.write(f"{sentence}\n")
                sys.stderr.flush()
                if answers is not None:
                    within(self.window_s, lambda: self._store.set(said, ""))
                    time.sleep(2 * self.poll_s)  # the others still look; this rank may hold the store
            else:  # whoever ends first takes the others along
                within(self.window_s, lambda: self._store.wait([said]))
        except (RuntimeError, TimeoutError):
            time.sleep(self.poll_s)
        os._exit(EXIT_CRASHED)  # the main thread cannot be called back from a collective


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_wait(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(WAITS[0]) or frame.f_code.co_filename.endswith(WAITS[1])


def _listed(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
