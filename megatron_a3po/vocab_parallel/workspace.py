"""The one buffer of logits, kept from call to call.

On a CPU a buffer of this size comes from the operating system page by page, each cleared first, and goes back when
freed: several percent of a call. A caller that keeps a `Workspace` pays that once. On a GPU torch's allocator keeps
freed memory anyway, and a buffer held through the rest of a step would only be missing there: nothing is kept.
"""

import torch
from torch import Tensor


class Workspace:
    """What it hands out is valid until the next call of `take`."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[tokens, columns], not initialised."""
        if device.type == "cuda":
            return torch.empty(tokens, columns, dtype=dtype, device=device)
        wanted = tokens * columns
        held = self._buffer
        if held is None or held.numel() < wanted or (held.dtype, held.device) != (dtype, device):
            self._buffer = held = None  # the old one goes before the new one comes
            self._buffer = held = torch.empty(wanted, dtype=dtype, device=device)
        return held[:wanted].view(tokens, columns)

    def release(self) -> None:
        """Give the memory back."""
        self._buffer = None
