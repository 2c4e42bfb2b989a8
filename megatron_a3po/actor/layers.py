"""The layers of the target policy: Megatron-Core's, with the parts it lacks without Transformer Engine put in place."""

import importlib.util
from functools import partial
from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_a3po.actor.attention import PackedAttention, TransformerEngineAttention, has_window
from megatron_a3po.actor.latent_attention import LatentAttention
from megatron_a3po.actor.rotary import rotary_scale
from megatron_a3po.config import ModelShape


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism: its weight's gradient is summed over the tensor axis.

    A zero-centred one multiplies by 1 + weight, in fp32. Source: transformers' Gemma3RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        normed = rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class NormedRowParallelLinear(RowParallelLinear):
    """The last projection of attention or MLP with a norm behind it, before the residual is added."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **rest: Any) -> None:
        super().__init__(input_size, output_size, config=config, **rest)
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> Any:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


class TwoRotarySelfAttention(SelfAttention):
    """Takes the second of the model's two rotary embeddings in layers with a window, and the first elsewhere."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As the base class's, but `rotary_pos_emb` is [2, rows, 1, 1, head_dim]."""
        both: Tensor = kwargs.pop("rotary_pos_emb")
        local = has_window(self.config, self.layer_number)
        return super().forward(*inputs, rotary_pos_emb=both[int(local)], **kwargs)


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()


def block_spec(
    shape: ModelShape,
    config: TransformerConfig,
    *,
    vp_stage: int | None,
    pp_rank: int,
    transformer_engine: bool,
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage, each by its number over the whole model."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm as FinalNorm
    else:
        FinalNorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(shape, layer, transformer_engine) for layer in range(first, first + num_layers)
        ],
        layer_norm=cast(Any, FinalNorm),
    )


def layer_spec(shape: ModelShape, layer: int, transformer_engine: bool) -> ModuleSpec:
    """Layer number `layer` (from 0) of the model.

    Source: get_gpt_layer_local_spec or get_gpt_layer_with_transformer_engine_spec, core attention (and norms) replaced.
    """
    num_experts = shape.experts.num_experts if shape.experts and shape.is_sparse(layer) else None
    if shape.latent_attention is not None:
        return _latent_layer(shape, num_experts)
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts, qk_layernorm=shape.qk_norm)
        parts: Any = spec.submodules
        parts.self_attention.submodules.core_attention = TransformerEngineAttention
        return spec
    spec = get_gpt_layer_local_spec(num_experts, normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if num_experts is not None:
        # In a distributed checkpoint too it is no part of the MLP, as under Transformer Engine.
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention: Any = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if shape.sandwich_norms:
        # Megatron-Core 0.16 holds an MLP's parts in a spec, 0.19 in a partial.
        mlp: Any = (
            parts.mlp.keywords["submodules"] if isinstance(parts.mlp, partial) else parts.mlp.submodules
        )
        attention.linear_proj = mlp.linear_fc2 = NormedRowParallelLinear
    if shape.local_rope is not None:
        parts.self_attention.module = TwoRotarySelfAttention
    return spec


def _latent_layer(shape: ModelShape, num_experts: int | None) -> ModuleSpec:
    """A layer with latent attention, in plain torch wherever it runs."""
    spec = get_gpt_layer_local_spec(
        num_experts, normalization="RMSNorm", qk_layernorm=True, multi_latent_attention=True
    )
    parts: Any = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if num_experts is None:
        # In a distributed checkpoint, norms are called as in every other dense layer.
        parts.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    attention: Any = parts.self_attention
    attention.module = LatentAttention
    attention.params = {**attention.params, "rotary_scale": rotary_scale(shape.rope)}
    attention.submodules.core_attention = PackedAttention
    attention.submodules.q_layernorm = attention.submodules.kv_layernorm = RMSNorm
    return spec
