"""Rotary angles against transformers' own modules, bit for bit, far beyond the positions a test's model sees."""

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_a3po.actor.rotary import Rotary
from megatron_a3po.config.model_shape import Rope

MAX_POSITIONS = 131072
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES = [
    Rope(5e5),
    Rope(5e5, "llama3", LLAMA3),
    Rope(1e6, "linear", {"factor": 8.0}),
    Rope(1e6, "linear", {"factor": 3.0}),
]


def parameters(rope: Rope) -> dict[str, Any]:
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling}


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_angles_are_those_of_transformers(rope: Rope):
    positions = torch.arange(0, MAX_POSITIONS, 7)
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=parameters(rope),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    angles = Rotary([rope], 128, MAX_POSITIONS)(positions)
    assert angles.shape == (len(positions), 1, 1, 128)
    assert torch.equal(angles.cos()[:, 0, 0], cos[0])
    assert torch.equal(angles.sin()[:, 0, 0], sin[0])


def test_a_model_may_have_two():
    ropes = {"full_attention": ROPES[2], "sliding_attention": Rope(1e4)}
    config = Gemma3TextConfig(
        head_dim=128,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={kind: parameters(rope) for kind, rope in ropes.items()},
    )
    positions = torch.tensor([0, 1, 2, 0, 1, 99999])
    angles = Rotary(list(ropes.values()), 128, MAX_POSITIONS)(positions)
    assert angles.shape == (2, 6, 1, 1, 128)
    for found, kind in zip(angles, ropes, strict=True):
        cos, _ = Gemma3RotaryEmbedding(config)(torch.zeros(1), positions[None], kind)
        assert torch.equal(found.cos()[:, 0, 0], cos[0])
