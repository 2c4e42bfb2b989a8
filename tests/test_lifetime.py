"""A forked child ends with its parent, whatever signal handlers it inherited, and whichever of the two is quicker."""

import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import os, signal, time
from megatron_a3po.lifetime import end_with_parent

signal.signal(signal.SIGTERM, lambda *_: None)
parent, is_late = os.getpid(), {is_late}
if os.fork() == 0:
    while is_late and os.getppid() == parent:
        print(os.getpid(), flush=True)
        time.sleep(0.01)
    end_with_parent(parent)
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that waits for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ends_with_its_parent(is_late: bool) -> bool:
    program = PARENT.format(is_late=is_late)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = not is_running(child)
        if not ended:
            subprocess.run(["kill", "-9", str(child)], check=True)
    return ended


def test_a_child_ends_when_its_parent_is_killed():
    assert ends_with_its_parent(is_late=False)


def test_a_child_that_comes_late_ends_too():
    assert ends_with_its_parent(is_late=True)
