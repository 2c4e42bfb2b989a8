"""A forked servant ends with the process it serves, whatever signal handlers it inherited."""

import signal
import subprocess
import sys
import time
from pathlib import Path

MASTER = """
import multiprocessing, signal, time
from multiprocessing.managers import SyncManager
from megatron_a3po.lifetime import be_a_servant

signal.signal(signal.SIGTERM, lambda *_: None)
manager = SyncManager(ctx=multiprocessing.get_context("fork"))
manager.start(initializer=be_a_servant)
print(manager._process.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that waits for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_servant_ends_when_its_master_is_killed():
    with subprocess.Popen([sys.executable, "-c", MASTER], stdout=subprocess.PIPE, text=True) as master:
        assert master.stdout is not None
        servant = int(master.stdout.readline())
        assert is_running(servant)
        master.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(servant) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(servant)
