"""Which tokens attention may see, in the form in which a Hugging Face model takes it.

The decoder lays out its own rows, so it makes the masks itself. A model whose layers are of several kinds takes one for
each kind, by name; any other takes one for all its layers, with a window or without.
"""

from typing import Any

from torch import Tensor


class AttentionMasks:
    """Masks of one model, from its configuration."""

    def __init__(self, config: Any) -> None:
        self.window: int | None = getattr(config, "sliding_window", None)
        self.has_kinds = getattr(config, "layer_types", None) is not None

    def __call__(self, before: Tensor) -> Tensor | dict[str, Tensor]:
        """before [..., queries, columns]: how many positions a column lies before the query -> whether it is seen."""
        full = before >= 0
        windowed = full if self.window is None else full & (before < self.window)
        return {"full_attention": full, "sliding_attention": windowed} if self.has_kinds else windowed
