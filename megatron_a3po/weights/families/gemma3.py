"""Gemma 3's language model: Llama's tensors with norms of queries and keys, and norms behind attention and MLP."""

from megatron_a3po.weights.families.base import HF_LAYER, LAYER, Family, Rule
from megatron_a3po.weights.families.llama import ATTENTION, EMBEDDINGS, GATED_MLP, QK_NORM, mlp_norm
from megatron_a3po.weights.operations import copy

POST_NORMS = (
    Rule(
        LAYER + "self_attention.linear_proj.post_layernorm.weight",
        copy,
        {HF_LAYER + "post_attention_layernorm.weight": "hidden"},
    ),
    Rule(
        LAYER + "mlp.linear_fc2.post_layernorm.weight",
        copy,
        {HF_LAYER + "post_feedforward_layernorm.weight": "hidden"},
    ),
)

GEMMA3 = Family(
    "gemma3_text",
    (
        *EMBEDDINGS,
        *ATTENTION,
        *QK_NORM,
        *GATED_MLP,
        mlp_norm("pre_feedforward_layernorm.weight"),
        *POST_NORMS,
    ),
)
