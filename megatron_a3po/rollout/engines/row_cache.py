"""Keys and values of a batch of sequences, one row each, every row beginning at column 0 with a length of its own.

Nothing is padded on the left, so positions are the columns, and merging a new sequence or dropping a finished one
copies a row instead of shifting a batch. `transformers` calls `update` once per layer in a forward pass; what it does
was chosen before the pass by `begin_prefill` or `begin_decode`. Read next: `decoder.py`, the only user.
"""

import torch
from torch import Tensor

COLUMN_STEP = 64


class RowCache:
    """Per layer, keys and values of shape [rows, key-value heads, columns, head_dim], allocated at the first pass.

    A layer that sees only a window keeps all columns too: the mask hides what is behind it.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.num_columns = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows: Tensor | None = None
        self._positions: Tensor | None = None
        self._num_rows = 0
        self._width = 0

    def begin_prefill(self, rows: Tensor, width: int) -> None:
        """The next pass fills columns 0..width-1 of `rows` and attends within itself."""
        self._rows, self._positions, self._width = rows, None, width
        self._reserve(width)

    def begin_decode(self, positions: Tensor, width: int) -> None:
        """The next pass writes one column, `positions[i]` of row i, and attends to the first `width` columns."""
        self._num_rows = len(positions)
        self._rows = torch.arange(self._num_rows, device=positions.device)
        self._positions, self._width = positions, width
        self._reserve(width)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        if layer == len(self._keys):
            for tensors, new in ((self._keys, keys), (self._values, values)):
                shape = (self.max_rows, new.shape[1], self.num_columns, new.shape[3])
                # Zeros, not empty: a masked column still meets a weight of exactly 0, and 0 * NaN is NaN.
                tensors.append(new.new_zeros(shape))
        all_keys, all_values = self._keys[layer], self._values[layer]
        if self._positions is None:
            all_keys[self._rows, :, : self._width] = keys
            all_values[self._rows, :, : self._width] = values
            return keys, values
        all_keys[self._rows, :, self._positions] = keys[:, :, 0]
        all_values[self._rows, :, self._positions] = values[:, :, 0]
        return all_keys[: self._num_rows, :, : self._width], all_values[: self._num_rows, :, : self._width]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole rows onto others."""
        for tensor in (*self._keys, *self._values):
            tensor[targets] = tensor[sources]

    def _reserve(self, width: int) -> None:
        if width <= self.num_columns:
            return
        wanted = max(width, self.num_columns + self.num_columns // 2)
        self.num_columns = -(-wanted // COLUMN_STEP) * COLUMN_STEP
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.new_zeros((*tensor.shape[:2], self.num_columns, tensor.shape[3]))
                tensors[layer][:, :, : tensor.shape[2]] = tensor
