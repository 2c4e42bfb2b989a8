"""When a process ends: the wish to stop, which signals make, children that must not outlive their parent, and the
points at which a test of recovery kills it.

A wish is looked at between steps; how a run answers it is in `trainer/loop.py`. Next to nothing is imported here: the
command listens before torch is there, whose import takes seconds.
"""

import ctypes
import os
import signal
import sys
from collections import Counter
from types import FrameType

from megatron_a3po.environment import kill_order

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HEARD = b"\nstopping after this step; ctrl-C again ends the run at once\n"


class StopWish:
    """Set by SIGTERM, SIGUSR1 or ctrl-C; a second ctrl-C is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.wished = False
        self._interrupts = 0
        self._listener = os.getpid()

    @classmethod
    def listening(cls) -> "StopWish":
        """A wish that hears this process's signals; children that are forked inherit what it has heard."""
        stop = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, stop._hear)
        return stop

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.wished = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.getpid() == self._listener:
            os.write(2, HEARD)  # the answer may be minutes away; a log handler's lock may be held here


def end_with_parent(parent: int) -> None:
    """Called first thing in a forked child. Linux only; elsewhere a broken process group or pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was quicker
            os.kill(os.getpid(), signal.SIGKILL)


_passings: Counter[str] = Counter()


def kill_point(name: str) -> None:
    """Die here, as by kill -9, where A3PO_KILL_AT is `name`, or `name:n` at the n-th passing in this process.

    For tests of recovery alone: unset, this is one look at the environment. docs/reliability.md lists the points.
    """
    if (order := kill_order()) is None:
        return
    wanted, _, passing = order.partition(":")
    _passings[name] += 1
    if wanted == name and _passings[name] == int(passing or 1):
        os.kill(os.getpid(), signal.SIGKILL)
