"""Starts N gloo ranks by forking this process, runs a function on each, and gives back what each returned.

The parent has imported torch already, so a rank starts in milliseconds; functions and closures need no pickling, only
their results do. Forking is safe as long as the parent made no thread pool: importing this module holds torch to one
thread. When a rank fails, every rank's traceback is in the error, that of a rank still waiting for the failed one too
(faulthandler writes it), and the siblings are ended by their pids.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

torch.set_num_threads(1)

# After the first failure the others get this long to fail by themselves, then their stacks are written.
GRACE_S = 3.0
Outcome = tuple[Literal["returned", "raised"], Any]


class RanksFailed(AssertionError):
    """At least one rank raised, died or hung; the message has every rank's story."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, joined: bool = True
) -> list[Any]:
    """[function(rank, world_size, *args) on each rank], in the default process group of that many gloo ranks.

    Unless `joined`, the function makes the default process group itself. Results must be picklable. Raises RanksFailed
    when any rank raises, dies or is not done after `timeout_s`.
    """
    assert torch.get_num_threads() == 1, "ranks are forked: keep the parent at torch.set_num_threads(1)"
    assert not dist.is_initialized(), "ranks are forked: the parent must have no process group"
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [
            _Rank(rank, world_size, Path(folder), function, args, timeout_s, joined)
            for rank in range(world_size)
        ]
        try:
            _collect(ranks, time.monotonic() + timeout_s)
        finally:
            for rank in ranks:
                rank.end()
    if any(rank.outcome is None or rank.outcome[0] == "raised" for rank in ranks):
        raise RanksFailed("\n".join(rank.story() for rank in ranks))
    return [rank.outcome[1] for rank in ranks if rank.outcome is not None]


class _Rank:
    """One forked process, seen from the parent."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        folder: Path,
        function: Callable[..., Any],
        args: tuple,
        timeout_s: float,
        joined: bool,
    ):
        self.rank, self.stack_file, self.outcome = rank, folder / f"stack-{rank}", None
        self.outcome: Outcome | None
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self.process: BaseProcess = context.Process(
            target=_main,
            args=(sender, rank, world_size, folder, self.stack_file, function, args, timeout_s, joined),
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12 warns of any thread in the parent
            self.process.start()
        sender.close()

    def receive(self) -> None:
        """Takes the outcome in; a rank that died without one has closed its end."""
        try:
            self.outcome = pickle.loads(self.receiver.recv_bytes())
        except EOFError:
            self.process.join()
            self.outcome = "raised", f"died without a word, exit code {self.process.exitcode}"

    def write_stack(self) -> None:
        if self.outcome is None and self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def end(self) -> None:
        """Ends the process, by its own pid, if it has not ended by itself."""
        if self.outcome is None:
            self.process.kill()
        self.process.join(GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        if self.outcome is None and self.stack_file.exists():
            self.outcome = "raised", "not done; it was here when it was ended\n" + self.stack_file.read_text()
        self.receiver.close()

    def story(self) -> str:
        what, value = self.outcome or ("raised", "not done")
        return f"--- rank {self.rank}: {value if what == 'raised' else 'returned'}"


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Waits for every outcome, for GRACE_S after the first failure, or for the deadline."""
    while waiting := {rank.receiver: rank for rank in ranks if rank.outcome is None}:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                rank.write_stack()
            time.sleep(0.2)  # for the signal handlers to write
            return
        for connection in ready:
            rank = waiting[connection]  # type: ignore[index]
            rank.receive()
            if rank.outcome is not None and rank.outcome[0] == "raised":
                deadline = min(deadline, time.monotonic() + GRACE_S)


def _main(
    sender: Connection,
    rank: int,
    world_size: int,
    folder: Path,
    stack_file: Path,
    function: Callable[..., Any],
    args: tuple,
    timeout_s: float,
    joined: bool,
) -> None:
    """A rank's life: join the group, run, send the outcome. The process ends without the parent's exit handlers."""
    outcome: Outcome
    with stack_file.open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no dependence on the machine's host name
        try:
            if joined:
                _join(rank, world_size, folder, timeout_s)
            outcome = "returned", function(rank, world_size, *args)
            if dist.is_initialized():
                dist.barrier()  # nobody leaves while another still needs its connection
        except BaseException:  # the boundary of a process: whatever it was, the parent shows it
            outcome = "raised", traceback.format_exc()
        sender.send_bytes(pickle.dumps(outcome))
        sender.close()
    sys.stdout.flush()
    os._exit(0)


def _join(rank: int, world_size: int, folder: Path, timeout_s: float) -> None:
    store = dist.FileStore(str(folder / "store"), world_size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
