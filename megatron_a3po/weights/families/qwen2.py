"""Qwen2 and Qwen2.5 (dense)."""

from megatron_a3po.weights.families.base import Family, Rule
from megatron_a3po.weights.operations import copy, gate_up, qkv, row, vocabulary

_LAYER = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_ATTENTION = tuple(f"{_HF}self_attn.{part}_proj." for part in "qkv")

FAMILY = Family(
    "qwen2",
    (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        Rule(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), copy),
        Rule(_LAYER + "self_attention.linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",), copy),
        Rule(_LAYER + "self_attention.linear_qkv.weight", tuple(a + "weight" for a in _ATTENTION), qkv),
        Rule(_LAYER + "self_attention.linear_qkv.bias", tuple(a + "bias" for a in _ATTENTION), qkv),
        Rule(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), row),
        Rule(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), copy),
        Rule(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), copy),
        Rule(
            _LAYER + "mlp.linear_fc1.weight",
            (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
            gate_up,
        ),
        Rule(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), row),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), copy),
        Rule("output_layer.weight", ("lm_head.weight",), vocabulary),
    ),
)
