"""Rotary position embeddings by position, with the frequencies of transformers bit for bit.

Megatron-Core's own rotary embedding scales positions where transformers scales frequencies, and knows one embedding a
model; it also wants packed sequences in another format.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_a3po.config.model_shape import Rope


class Rotary(torch.nn.Module):
    """The angles by which queries and keys are turned; frequencies stay fp32 in a model of half precision."""

    def __init__(self, ropes: list[Rope], head_dim: int, max_positions: int) -> None:
        super().__init__()
        # A plain attribute: a buffer would follow the module into bfloat16.
        self.frequencies = torch.stack([frequencies(rope, head_dim, max_positions) for rope in ropes])

    def forward(self, position_ids: Int[Tensor, " rows"]) -> Float[Tensor, "..."]:
        """-> [rows, 1, 1, head_dim] fp32, or [ropes, rows, 1, 1, head_dim] where the model has several."""
        self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.float()[:, None] * self.frequencies[:, None]
        both_halves = torch.cat((angles, angles), dim=-1)[:, :, None, None]
        return both_halves if len(both_halves) > 1 else both_halves[0]


def frequencies(rope: Rope, head_dim: int, max_positions: int) -> Float[Tensor, " half_head_dim"]:
    """Radians a position. Source: transformers' ROPE_INIT_FUNCTIONS and compute_default_rope_parameters."""
    if rope.kind == "default":
        return 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    return _of_transformers(rope, head_dim, max_positions)[0]


def rotary_scale(rope: Rope) -> float:
    """What sine and cosine are multiplied by."""
    return 1.0 if rope.kind == "default" else _of_transformers(rope, head_dim=2, max_positions=1)[1]


def _of_transformers(rope: Rope, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values: dict[str, Any] = {
        "rope_parameters": {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling},
        "head_dim": head_dim,
        "hidden_size": head_dim,
        "num_attention_heads": 1,
        "max_position_embeddings": max_positions,
    }
    config = PreTrainedConfig(**values)
    return ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
