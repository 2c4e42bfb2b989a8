"""A process group beside all others: rank 0 has the weights, every worker of every server receives them.

Both sides of a transfer run this file, the trainer as part of its package, a vLLM worker as part of the plugin; so it
imports torch alone. No member waits for ever: what is not done in time, or broken, is a ChannelError, and closing
a channel breaks it for all others.
"""

import datetime
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

POLL_S = 0.002
LOOK_S = 0.2  # whether it is closed, which asks the machine of rank 0
CLOSED = "closed"
LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")


class ChannelError(Exception):
    """The transfer is broken; another needs a new channel."""


class Channel:
    """backend: gloo, or nccl with `device` on a GPU. address: of the machine with rank 0, where the store is."""

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        *,
        address: str,
        port: int,
        backend: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._is_nccl = backend == "nccl"
        self._under_way: list[dist.Work] = []
        self._group: Any  # the backends' own classes, made without a default group, have no types
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
            self._store = joined = PrefixStore(name, store)
            self._meet(rank, size)
            if self._is_nccl:
                torch.cuda.set_device(device)
                nccl: Any = dist.ProcessGroupNCCL
                options = nccl.Options()
                options._timeout = timeout
                self._group = nccl(joined, rank, size, options)
            else:
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._timeout = timeout
                own = local_address(address, port) if rank else address
                options._devices = [gloo.create_device(hostname=own)]
                self._group = gloo(joined, rank, size, options)
        except RuntimeError as error:  # those of the store and of the backends are all of this kind
            raise ChannelError(f"the members of {name} did not meet: {error}") from error

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """From rank 0 to the others. Call `wait` before the buffer is used or changed."""
        try:
            work = self._group.broadcast([buffer], dist.BroadcastOptions())
        except RuntimeError as error:
            raise ChannelError(f"{self.name} is broken: {error}") from error
        self._under_way.append(work)
        return work

    def wait(self, work: dist.Work) -> None:
        try:
            # The backends' own waiting does not end where a member has given up, and NCCL's only orders streams.
            self._until(work.is_completed, "nothing came")
            work.wait()
        except RuntimeError as error:
            raise ChannelError(f"{self.name} is broken: {error}") from error
        self._under_way.remove(work)

    def is_closed(self) -> bool:
        """By any member, or for one that failed: no transfer comes of it any more."""
        return self._store.check([CLOSED])

    def close(self) -> None:
        """Whoever waits in this channel, here or elsewhere, waits no more."""
        with suppress(RuntimeError):  # the store may be gone, and the others with it
            close_channel(self._store)
        self._group.abort()
        if self._under_way:
            # gloo lets these run out, and whoever frees the group waits for them and lets no other thread run.
            threading.Thread(target=_outlive, args=(self._group, self._under_way), daemon=True).start()

    def _meet(self, rank: int, size: int) -> None:
        # A backend that is made waits for the last member, deaf to all else: so all are there before any makes one.
        if rank:
            self._store.set(f"here/{rank}", "")
            if self._store.get("verdict") != b"go":
                raise ChannelError(f"the members of {self.name} did not meet")
            return
        others = [f"here/{other}" for other in range(1, size)]
        try:
            self._until(lambda: self._store.check(others), "a member did not come")
        except ChannelError:
            self._store.set("verdict", "give up")
            raise
        self._store.set("verdict", "go")

    def _until(self, is_done: Callable[[], bool], otherwise: str) -> None:
        begun = looked = time.monotonic()
        while not is_done():
            now = time.monotonic()
            if now > begun + self._timeout_s:
                raise ChannelError(f"{self.name}: {otherwise} for {self._timeout_s:g} s")
            if now > looked + LOOK_S:
                looked = now
                if self.is_closed():
                    raise ChannelError(f"{self.name} was closed: a member has failed")
            time.sleep(POLL_S)


def close_channel(store: Any) -> None:
    """Also for who is no member. store: that of the channel alone."""
    store.set(CLOSED, "")


def _outlive(group: Any, works: list[dist.Work]) -> None:
    for work in works:
        with suppress(RuntimeError):
            work.wait()


def local_address(towards: str, port: int) -> str:
    """The address this machine has on the way to another; no packet is sent."""
    if towards.startswith(LOOPBACK):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        return probe.getsockname()[0]
