"""A launched server must not outlive the rollout process: each process of it ends with its parent, SIGKILL included."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
LAUNCHED = "A3PO_VLLM_LAUNCHED"


def end_with_launcher() -> None:
    """Only where megatron_a3po launched the server: one started by hand may be left running. Linux only."""
    if os.environ.get(LAUNCHED) == "1" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
