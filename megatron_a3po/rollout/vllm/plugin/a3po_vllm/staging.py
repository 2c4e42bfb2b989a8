"""New weights are received while the worker generates; to put them in place is then a matter of a copy.

`StagedUpdate` receives, on a thread of its own, into a `Room`. `Staging` is the worker extension by which the trainer's
side starts it and asks how far it is (`--worker-extension-cls`): vLLM's own weight-transfer calls stop generation for
as long as they take. No vLLM here; `shadow.py` is the room of most models.
"""

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, Protocol

import torch

from a3po_vllm.receiving import NamedTensors, Receiver

EXTENSION = "a3po_vllm.staging.Staging"


class Staging:
    """Mixed into vLLM's worker. What is asked by name over HTTP takes and gives strings."""

    weight_transfer_engine: Any

    def stage_weights(self, source: str) -> None:
        self.weight_transfer_engine.staged.begin(json.loads(source))

    def staged_weights(self) -> str:
        """`receiving`, `there`, or why it failed."""
        return self.weight_transfer_engine.staged.state


class Room(Protocol):
    """Memory for one model beside that which generates, used again every time."""

    def fill(self, buckets: Iterable[NamedTensors]) -> None: ...

    def place(self) -> None:
        """What it was filled with becomes the model's, which stands still."""
        ...


class Kept:
    """The tensors as they came, in host memory; to place them is to load them."""

    def __init__(self, load: Callable[[Iterable[NamedTensors]], None]) -> None:
        self._load = load
        self._memory: dict[str, torch.Tensor] = {}

    def fill(self, buckets: Iterable[NamedTensors]) -> None:
        received = set()
        for bucket in buckets:
            for name, tensor in bucket:
                self._keep(name, tensor)
                received.add(name)
        for name in self._memory.keys() - received:
            del self._memory[name]

    def place(self) -> None:
        self._load([list(self._memory.items())])

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        kept = self._memory.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
            self._memory[name] = kept
        kept.copy_(tensor)


class StagedUpdate:
    """State changes on the thread alone, from `receiving` to what it ends with."""

    def __init__(self, receiver: Receiver, make_room: Callable[[], Room]) -> None:
        self._receiver = receiver
        self._make_room = make_room
        self._room: Room | None = None
        self._thread: threading.Thread | None = None
        self.state = "nothing was asked for"

    def begin(self, source: dict[str, Any]) -> None:
        if self._thread is not None:
            self._thread.join()  # of an update that broke; its channel's time limit ends it
        self._room = self._room or self._make_room()
        self.state = "receiving"
        self._thread = threading.Thread(
            target=self._receive, args=(source, self._room), name="staged weights", daemon=True
        )
        self._thread.start()

    def place(self) -> None:
        if self._room is None or self.state != "there":
            raise RuntimeError(f"weights were to be loaded that are not there: {self.state}")
        self._room.place()

    def _receive(self, source: dict[str, Any], room: Room) -> None:
        try:
            # Others that receive the same need not wait for one that fails.
            with torch.no_grad(), closing(self._receiver.buckets(source)) as buckets:
                room.fill(buckets)
        except Exception as error:  # told to whoever asks
            self.state = f"{type(error).__name__}: {error}"
        else:
            self.state = "there"
