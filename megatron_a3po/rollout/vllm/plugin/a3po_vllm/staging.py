"""New weights are received into host memory while the worker generates; to load them is then a matter of a copy.

`StagedUpdate` is one model in memory, filled by a thread of its own and used again every time. `Staging` is the
worker extension by which the trainer's side starts it and asks how far it is (`--worker-extension-cls`): vLLM's own
weight-transfer calls stop generation for as long as they take.
"""

import json
import threading
from collections.abc import Generator
from typing import Any

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


class StagedUpdate:
    """State changes on the thread alone, from `receiving` to what it ends with."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._memory: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self.state = "nothing was asked for"

    def begin(self, source: dict[str, Any]) -> None:
        if self._thread is not None:
            self._thread.join()  # of an update that broke; its channel's time limit ends it
        self.state = "receiving"
        self._thread = threading.Thread(
            target=self._receive, args=(source,), name="staged weights", daemon=True
        )
        self._thread.start()

    def tensors(self) -> Generator[NamedTensors, None, None]:
        """What has been received."""
        if self.state != "there":
            raise RuntimeError(f"weights were to be loaded that are not there: {self.state}")
        yield list(self._memory.items())

    def _receive(self, source: dict[str, Any]) -> None:
        received = set()
        try:
            for bucket in self._receiver.buckets(source):
                for name, tensor in bucket:
                    self._keep(name, tensor)
                    received.add(name)
            for name in self._memory.keys() - received:
                del self._memory[name]
        except Exception as error:  # told to whoever asks
            self.state = f"{type(error).__name__}: {error}"
        else:
            self.state = "there"

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        kept = self._memory.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
            self._memory[name] = kept
        kept.copy_(tensor)
