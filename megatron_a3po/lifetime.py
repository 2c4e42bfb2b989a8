"""A process must not outlive the one that started it: whatever ends the parent ends the child, SIGKILL included."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Called first thing in a forked child. Linux only; elsewhere a broken process group or pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def be_a_servant() -> None:
    """For a forked child that only serves its parent: ends with it, leaves ctrl-C to it, and obeys SIGTERM."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
