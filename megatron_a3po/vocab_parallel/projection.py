"""A chunk's logits: projected into float32 whatever the weight's precision, and where their exponentials go.

Logits rounded to bfloat16 would cost the log-probs their digits: 16.6 becomes 16.625, and clips turn on that. So where
the products' factors are in half precision a part of the chunk at a time is projected, into a small float32 buffer, and
only its exponentials are rounded, all of them between 0 and 1, into the buffer of the whole chunk that the other two
products read. With float32 factors logits and exponentials are one buffer and the part is the chunk.

The temperature multiplies where logits are read and in the factors of the gradient: rows divided by it would have to be
rounded again. Next: `shard_softmax`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megatron_a3po.vocab_parallel.products import arithmetic_dtype, project_
from megatron_a3po.vocab_parallel.workspace import Workspace

# Rows projected at a time in half precision: an eighth of a GPU's shortest chunk, so a quarter of its bytes.
PART_TOKENS = 512


@dataclass(frozen=True)
class Buffers:
    """Of a call: for a whole chunk's exponentials and a part's logits."""

    exponentials: Float[Tensor, "longest shard"]
    logits: Float32[Tensor, "part shard"]

    @classmethod
    def of(
        cls, workspace: Workspace, tokens: int, columns: int, weight: Float[Tensor, "shard hidden"]
    ) -> "Buffers":
        """One where the factors are float32."""
        dtype = arithmetic_dtype(weight)
        exponentials = workspace.take(tokens, columns, dtype, weight.device)
        if dtype == torch.float32:
            return cls(exponentials, exponentials)
        return cls(exponentials, torch.empty(min(tokens, PART_TOKENS), columns, device=weight.device))


@dataclass(frozen=True)
class Projection:
    """Rows and the weight they are to be projected with; what comes of it is valid until the next chunk."""

    rows: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "shard hidden"]
    scale: Float32[Tensor, "tokens"] | None  # 1 / temperature; None: 1
    buffers: Buffers

    @property
    def exponentials(self) -> Float[Tensor, "tokens shard"]:
        """The buffer for the exponentials of all parts."""
        return self.buffers.exponentials[: len(self.rows)]

    def parts(self) -> Iterator[tuple[slice, Float32[Tensor, "part shard"]]]:
        """Which tokens, and their logits before the temperature: each part is gone when the next comes."""
        logits = self.buffers.logits
        for start in range(0, len(self.rows), len(logits)):
            rows = self.rows[start : start + len(logits)]
            yield slice(start, start + len(rows)), project_(logits[: len(rows)], rows, self.weight)

    def scale_of(self, part: slice) -> Float32[Tensor, "part"] | None:
        """The part's share of `scale`."""
        return None if self.scale is None else self.scale[part]
