"""The newest published weights in the host memory of one process, sent on while they still come in.

One thread fills bucket after bucket, another reads along behind it. The memory is that of one model, used again for
every version: whoever fills waits until nobody reads. Nothing here knows who takes the weights.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_a3po.weights.transports.buckets import Bucket


class HeldWeights:
    """pinned: in memory that a GPU copies from and to without the CPU."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._changed = threading.Condition()
        self._version = -1
        self._buckets: Sequence[Bucket] = ()
        self._memory: list[Tensor] = []
        self._num_filled = 0
        self._is_read = False

    def begin(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Give up the version before. Waits until it is no longer being read."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_read)
            if [one.num_bytes for one in buckets] != [len(one) for one in self._memory]:
                self._memory.clear()  # before the new is there
                self._memory += (
                    torch.empty(one.num_bytes, dtype=torch.uint8, pin_memory=self._pinned) for one in buckets
                )
            self._version, self._buckets, self._num_filled = version, buckets, 0

    def room(self, index: int) -> Tensor:
        """Where the bytes of a bucket go. They are asked for, and `filled`, in order."""
        return self._memory[index]

    def filled(self) -> None:
        with self._changed:
            self._num_filled += 1
            self._changed.notify_all()

    @contextmanager
    def reading(self) -> "Iterator[tuple[int, Sequence[Bucket]]]":
        """(version, buckets) that stay until the context is left."""
        with self._changed:
            self._is_read = True
        try:
            yield self._version, self._buckets
        finally:
            with self._changed:
                self._is_read = False
                self._changed.notify_all()

    def as_filled(self, timeout_s: float) -> Iterator[Tensor]:
        """The bytes of each bucket as soon as they are there; inside `reading`. TimeoutError where none come."""
        for index, memory in enumerate(self._memory):
            with self._changed:
                if not self._changed.wait_for(lambda index=index: self._num_filled > index, timeout_s):
                    raise TimeoutError(f"the trainer gathered nothing for {timeout_s:g} s")
            yield memory
