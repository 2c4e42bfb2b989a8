"""How a transfer of weights is asked for: an offer in a published directory, a request and its answer in a store.

Blocking, and used by the rollout process, which knows the servers and is on the trainer's machine. The other end is
`sender.py`.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_a3po.environment import LOCALHOST
from megatron_a3po.weights.aside import close_aside, open_aside
from megatron_a3po.weights.transports.channel import close_channel

OFFER = "offer.json"
LONG = datetime.timedelta(days=30)  # the sending side has time limits of its own


@dataclass(frozen=True)
class Offer:
    """Where the trainer answers requests, on this machine alone."""

    port: int

    def write(self, directory: Path) -> None:
        (open_aside(directory) / OFFER).write_text(json.dumps({"port": self.port}))
        close_aside(directory)


def read_offer(directory: Path) -> Offer | None:
    """None where the directory holds the weights themselves."""
    file = directory / OFFER
    return Offer(**json.loads(file.read_text())) if file.is_file() else None


class Transfer:
    """One transfer. Errors: RuntimeError where the trainer's end is gone or does not answer in time."""

    def __init__(
        self,
        offer: Offer,
        members: Sequence[str],
        num_workers: int,
        address: str,
        timeout_s: float,
    ) -> None:
        """members: a name for each server, another one for each of its lives. address: of this machine, for them."""
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._store = self._connect(offer.port)
        self._channel: dict[str, Any] | None = None
        self._number = self._store.add("transfers", 1)
        request = {"members": list(members), "num_workers": num_workers, "address": address}
        self._store.set(f"request/{self._number}", json.dumps(request))

    def answer(self) -> dict[str, Any]:
        """Which version it will be, how to join and how the bytes are laid out."""
        answer = json.loads(self._store.get(f"answer/{self._number}"))
        self._channel = answer["channel"]
        return answer

    def give_up(self) -> None:
        """Once there is an answer: a member has failed, so that the others wait in vain."""
        assert self._channel is not None
        close_channel(PrefixStore(self._channel["name"], self._connect(self._channel["port"])))

    def why_broken(self) -> str:
        """Once all has been sent or given up: nothing, or why."""
        outcome = f"outcome/{self._number}"
        self._store.wait([outcome], LONG)
        return self._store.get(outcome).decode()

    def _connect(self, port: int) -> TCPStore:
        return TCPStore(LOCALHOST, port, is_master=False, wait_for_workers=False, timeout=self._timeout)
