"""What the layer cannot do, refused in words before a wrong gradient comes of it. Wrong arguments: `inputs`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_a3po.vocab_parallel.token_fields import Objective


class SpentOnce:
    """One backward for each forward: gradients are handed out, or recomputed into the main gradient, once."""

    def __init__(self) -> None:
        self.spent = False

    def take(self, upstream: Tensor | None) -> Tensor:
        """The upstream gradient, the first time."""
        if self.spent:
            raise RuntimeError("the loss layer's gradients were handed out already: one backward per forward")
        if upstream is None or upstream.dim() != 0:
            shape = None if upstream is None else tuple(upstream.shape)
            raise RuntimeError(
                f"the loss layer's upstream gradient must be one number, and has shape {shape}"
            )
        self.spent = True
        return upstream


def refuse_recompute() -> None:
    """Raises inside activation recompute, where a forward with gradients runs a second time, within a backward."""
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the loss layer runs inside activation recompute, where its gradients would be added twice; "
            "leave it outside the recomputed (checkpointed) function"
        )


def refuse_loss_scaling(grad_scale_func: Callable[..., Any] | None) -> None:
    """For start-up: with a main gradient the one-sweep layer needs an upstream gradient of 1.

    It is never checked later, since that would read the device.
    """
    if grad_scale_func is not None:
        raise ValueError(
            "the loss layer writes the weight gradient in forward, so the loss cannot be scaled afterwards: "
            "train in bf16 or fp32, without grad_scale_func"
        )


def refuse_too_few_sweeps(objective: Objective, sweeps: int) -> None:
    """An objective that looks across tokens cannot be differentiated chunk by chunk."""
    if sweeps not in (1, 2):
        raise ValueError(f"sweeps is {sweeps}, but must be 1 or 2")
    if sweeps == 1 and getattr(objective, "needs_all_tokens", False):
        raise ValueError(
            f"{type(objective).__name__} needs the log-probs of all tokens of a sequence before the first "
            "gradient; ask for two sweeps with sweeps=2"
        )
