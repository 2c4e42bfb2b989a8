"""Multi-head latent attention (DeepSeek): queries, keys and values from low-rank latents, over packed sequences.

The parameters, their names and their shards are Megatron-Core's. Its forward takes positions from the length of the
sequence alone; this one turns queries and keys at the pack's positions, which the model gives it as to any attention.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention
from torch import Tensor
from torch.nn.functional import pad

from megatron_a3po.actor.attention import PackedSequences
from megatron_a3po.actor.experts import must_divide
from megatron_a3po.config import ModelShape
from megatron_a3po.config.actor import ActorSection

if not isinstance(multi_latent_attention.TELinear, type):
    # Without Transformer Engine, Megatron-Core 0.16 has mocks of its classes here and takes them for real.
    multi_latent_attention.HAVE_TE = False

PARTS = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


class LatentAttention(multi_latent_attention.MLASelfAttention):
    """Megatron-Core's latent attention with a forward of its own. Source: transformers' DeepseekV3Attention."""

    def __init__(self, *args: Any, rotary_scale: float, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.rotary_scale = rotary_scale
        del self.rotary_pos_emb

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # Megatron-Core 0.19 would want a norm of the queries where they have no rank.
        return {part: getattr(submodules, part) for part in PARTS}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSequences,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [rows (/TP under sequence parallelism), 1, hidden] -> the same, and no bias."""
        query, key, value = self._query_key_value(hidden_states, rotary_pos_emb)
        # Attention's quick kernels want one head size for all three; zeros of the values stay zeros.
        padded = pad(value, (0, query.shape[-1] - value.shape[-1]))
        attended = self.core_attention(query, key, padded, packed_seq_params=packed_seq_params)
        attended = attended.unflatten(-1, padded.shape[-2:])[..., : value.shape[-1]].flatten(-2)
        return self.linear_proj(attended)

    def _query_key_value(self, hidden: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [rows, 1, this rank's heads, dim of queries or values]."""
        config = self.config
        query = self._queries(hidden).unflatten(-1, (-1, self.q_head_dim))
        both = self._gathered(self.linear_kv_down_proj(hidden)[0])
        latent, key_turned = both.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        normed = self.kv_layernorm(self._scattered(latent))  # pyright: ignore[reportCallIssue]
        up, _ = self.linear_kv_up_proj(normed)
        up = up.unflatten(-1, (-1, config.qk_head_dim + config.v_head_dim))
        key_plain, value = up.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        query_plain, query_turned = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        query = torch.cat((query_plain, self._turned(query_turned, angles)), dim=-1)
        # One for all heads: its gradient is the sum over every tensor rank's.
        key_turned = copy_to_tensor_model_parallel_region(key_turned, group=self.pg_collection.tp)
        key_turned = self._turned(key_turned[:, :, None], angles).expand(-1, -1, key_plain.shape[2], -1)
        return query, torch.cat((key_plain, key_turned), dim=-1), value

    def _queries(self, hidden: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.linear_q_proj(hidden)[0]
        latent = self._scattered(self._gathered(self.linear_q_down_proj(hidden)[0]))
        return self.linear_q_up_proj(self.q_layernorm(latent))[0]

    def _gathered(self, latent: Tensor) -> Tensor:
        """Projections down to a latent are split over the tensor axis; every head needs all of it."""
        return gather_from_tensor_model_parallel_region(latent, group=self.pg_collection.tp)

    def _scattered(self, latent: Tensor) -> Tensor:
        """Projections up gather the rows themselves."""
        if not self.config.sequence_parallel:
            return latent
        return scatter_to_sequence_parallel_region(latent, group=self.pg_collection.tp)

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        """x [rows, 1, heads, dim] by angles [rows, 1, 1, dim], a pair being neighbours in x and half of dim apart in
        the result."""
        angles = angles[..., : x.shape[-1] // 2]
        cos, sin = ((turn * self.rotary_scale).to(x.dtype) for turn in (angles.cos(), angles.sin()))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def latent_settings(actor: ActorSection, shape: ModelShape) -> dict[str, Any]:
    """What MLATransformerConfig says beyond TransformerConfig; nothing where attention is not latent."""
    latent = shape.latent_attention
    if latent is None:
        return {}
    sizes = {
        "ranks of queries": latent.query_rank,
        "ranks of keys and values": latent.key_value_rank + latent.rotary_head_dim,
    }
    must_divide("tensor_model_parallel_size", actor.tensor_model_parallel_size, sizes)
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.plain_head_dim,
        "qk_pos_emb_head_dim": latent.rotary_head_dim,
        "v_head_dim": latent.value_head_dim,
        "rope_type": "rope",  # of Megatron-Core's own embedding, which is not used
        # From these two comes the softmax's scale.
        "rotary_scaling_factor": shape.rope.scaling.get("factor", 1.0),
        "mscale_all_dim": shape.rope.scaling.get("mscale_all_dim", 0.0),
    }
