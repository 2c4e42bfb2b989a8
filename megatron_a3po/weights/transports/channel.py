"""A process group beside all others: rank 0 has the weights, every worker of every server receives them.

Both sides of a transfer run this file, the trainer as part of its package, a vLLM worker as part of the plugin; so it
imports torch alone. No member waits for ever: what is not done in time, or broken, is a ChannelError, and closing
a channel breaks it for all others.
"""

import datetime
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

POLL_S = 0.002
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
        self._group: Any  # the backends' own classes, made without a default group, have no types
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
            joined = PrefixStore(name, store)
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
            return self._group.broadcast([buffer], dist.BroadcastOptions())
        except RuntimeError as error:
            raise ChannelError(f"{self.name} is broken: {error}") from error

    def wait(self, work: dist.Work) -> None:
        try:
            if self._is_nccl:
                self._poll(work)
            else:
                work.wait(datetime.timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise ChannelError(f"{self.name} is broken: {error}") from error

    def close(self) -> None:
        """Whoever waits in this channel, here or elsewhere, waits no more."""
        self._group.abort()

    def _poll(self, work: dist.Work) -> None:
        # NCCL's own wait only orders streams: it neither waits for the transfer nor ends where a member is gone.
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise ChannelError(f"{self.name}: nothing came for {self._timeout_s:g} s")
            time.sleep(POLL_S)
        work.wait()


def local_address(towards: str, port: int) -> str:
    """The address this machine has on the way to another; no packet is sent."""
    if towards.startswith(LOOPBACK):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        return probe.getsockname()[0]
