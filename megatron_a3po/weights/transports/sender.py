"""The trainer's end of a collective transfer: held weights are sent to whoever is named, one transfer at a time.

A thread of its own answers requests (`requests.py` makes them) that lie in a store, which is also where the members of
a channel meet. A request names the workers; the answer says which version they will get, always the newest, and how its
bytes are laid out. A channel is used again as long as the same workers ask and nothing has broken.
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
    """loopback_only: nobody beyond this machine is listened to."""

    def __init__(
        self, held: HeldWeights, *, device: torch.device, loopback_only: bool, timeout_s: float
    ) -> None:
        self._held, self._device, self._timeout_s = held, device, timeout_s
        self._channel: tuple[list[str], Channel] | None = None
        listening = socket.socket()
        listening.bind((LOCALHOST if loopback_only else "", 0))
        listening.listen()
        self.port: int = listening.getsockname()[1]
        self._server = TCPStore(
            LOCALHOST, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
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
            why = self._transfer(number, request)
            if why:
                logger.warning("a transfer of weights is broken: %s", why)
            self._store.set(f"outcome/{number}", why)
            for kind in ("request", "answer", "outcome"):
                self._store.delete_key(f"{kind}/{number - 1}")

    def _transfer(self, number: int, request: dict[str, Any]) -> str:
        """Why it is broken; nothing where it is not."""
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
                "port": self.port,
                "backend": "nccl" if self._device.type == "cuda" else "gloo",
                "timeout_s": self._timeout_s,
            }
            channel = {"name": name, "size": request["num_workers"] + 1, **settings}
            answer = {"version": version, "channel": channel, "buckets": [one.as_json() for one in buckets]}
            self._store.set(f"answer/{number}", json.dumps(answer))
            try:
                if self._channel is None:
                    opened = Channel(name, 0, channel["size"], device=self._device, **settings)
                    self._channel = (members, opened)
                self._send(self._channel[1])
            except (ChannelError, TimeoutError, torch.OutOfMemoryError) as error:
                self._drop_channel()
                return str(error)
        return ""

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
