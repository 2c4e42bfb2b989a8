"""The trainer's end of a collective transfer: held weights are sent to whoever is named, one transfer at a time.

A thread of its own answers requests (`requests.py` makes them) that lie in a store, which only this machine can
reach; the members of a channel meet in another, which the machines of the servers must reach. A request names the
workers; the answer says which version they will get, always the newest, and how its bytes are laid out. A channel is
used again as long as the same workers ask and nothing has broken.
"""

import datetime
import itertools
import json
import logging
import secrets
import socket
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_a3po.environment import LOCALHOST
from megatron_a3po.weights.transports.channel import Channel, ChannelError
from megatron_a3po.weights.transports.held import HeldWeights

logger = logging.getLogger(__name__)

LONG = datetime.timedelta(days=365)
UNDER_WAY = 2


class Sender:
    """port: where it is asked. loopback_only: no member is beyond this machine."""

    def __init__(
        self, held: HeldWeights, *, device: torch.device, loopback_only: bool, timeout_s: float
    ) -> None:
        self._held, self._device, self._timeout_s = held, device, timeout_s
        self._channel: tuple[list[str], Channel] | None = None
        self._server, self.port = _serve(LOCALHOST)
        self._meeting_place, self._meeting_port = _serve(LOCALHOST if loopback_only else "")
        # A store that waits keeps all others who use it waiting: the thread has a connection of its own.
        self._store = TCPStore(LOCALHOST, self.port, is_master=False, wait_for_workers=False)
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After the transfer that is under way."""
        number = self._server.add("transfers", 1)
        self._server.set(f"request/{number}", "null")
        self._thread.join(self._timeout_s)
        self._drop_channel()

    def _run(self) -> None:
        for number in itertools.count(1):
            self._store.wait([f"request/{number}"], LONG)
            request = json.loads(self._store.get(f"request/{number}"))
            if request is None:
                return
            try:
                self._transfer(number, request)
                why = ""
            except Exception as error:  # whoever asked waits for an outcome, and may ask again
                self._drop_channel()
                why = str(error) or repr(error)
                logger.warning("a transfer of weights is broken: %s", why, exc_info=_trace_of(error))
            self._store.set(f"outcome/{number}", why)
            for kind in ("request", "answer", "outcome"):
                self._store.delete_key(f"{kind}/{number - 1}")

    def _transfer(self, number: int, request: dict[str, Any]) -> None:
        members = request["members"]
        with self._held.reading() as (version, buckets):
            if self._channel is None or self._channel[0] != members or self._channel[1].is_closed():
                self._drop_channel()
                # A server may have outlived another trainer, and has a channel of that one.
                name = f"channel/{number}-{secrets.token_hex(4)}"
            else:
                name = self._channel[1].name
            settings = {
                "address": request["address"],
                "port": self._meeting_port,
                "backend": "nccl" if self._device.type == "cuda" else "gloo",
                "timeout_s": self._timeout_s,
            }
            channel = {"name": name, "size": request["num_workers"] + 1, **settings}
            answer = {"version": version, "channel": channel, "buckets": [one.as_json() for one in buckets]}
            self._store.set(f"answer/{number}", json.dumps(answer))
            if self._channel is None:
                opened = Channel(name, 0, channel["size"], device=self._device, **settings)
                self._channel = (members, opened)
            self._send(self._channel[1])

    def _send(self, channel: Channel) -> None:
        under_way: list[tuple[dist.Work, torch.Tensor]] = []
        for memory in self._held.as_filled(self._timeout_s):
            buffer = memory.to(self._device)
            under_way.append((channel.broadcast(buffer), buffer))
            if len(under_way) == UNDER_WAY:
                channel.wait(under_way.pop(0)[0])
        for work, _ in under_way:
            channel.wait(work)

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel[1].close()
            self._channel = None


def _serve(address: str) -> tuple[TCPStore, int]:
    """A store of this process, and its port. Without an address every interface listens."""
    listening = socket.socket()
    listening.bind((address, 0))
    listening.listen()
    port: int = listening.getsockname()[1]
    return TCPStore(
        LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    ), port


def _trace_of(error: Exception) -> Exception | None:
    """What is not broken by a member is a fault of ours."""
    return None if isinstance(error, (ChannelError, TimeoutError, torch.OutOfMemoryError)) else error
