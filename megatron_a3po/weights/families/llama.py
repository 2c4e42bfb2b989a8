"""Llama, and with one addition each Mistral, Qwen2 and Qwen3: dense decoders whose tensors have the same names."""

from megatron_a3po.weights.families.base import HF_LAYER, LAYER, Family, Rule
from megatron_a3po.weights.operations import copy, gate_up, qkv, row, vocabulary

EMBEDDINGS = (
    Rule("embedding.word_embeddings.weight", vocabulary, {"model.embed_tokens.weight": "vocab hidden"}),
    Rule("decoder.final_layernorm.weight", copy, {"model.norm.weight": "hidden"}),
    Rule("output_layer.weight", vocabulary, {"lm_head.weight": "vocab hidden"}, present="untied"),
)
ATTENTION = (
    Rule(
        LAYER + "input_layernorm.weight",
        copy,
        {HF_LAYER + "input_layernorm.weight": "hidden"},
        fused=LAYER + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Rule(
        LAYER + "self_attention.linear_qkv.weight",
        qkv,
        {
            HF_LAYER + "self_attn.q_proj.weight": "query hidden",
            HF_LAYER + "self_attn.k_proj.weight": "key_value hidden",
            HF_LAYER + "self_attn.v_proj.weight": "key_value hidden",
        },
    ),
    Rule(
        LAYER + "self_attention.linear_proj.weight",
        row,
        {HF_LAYER + "self_attn.o_proj.weight": "hidden query"},
    ),
)
QKV_BIAS = (
    Rule(
        LAYER + "self_attention.linear_qkv.bias",
        qkv,
        {
            HF_LAYER + "self_attn.q_proj.bias": "query",
            HF_LAYER + "self_attn.k_proj.bias": "key_value",
            HF_LAYER + "self_attn.v_proj.bias": "key_value",
        },
    ),
)
QK_NORM = (
    Rule(
        LAYER + "self_attention.q_layernorm.weight",
        copy,
        {HF_LAYER + "self_attn.q_norm.weight": "head"},
    ),
    Rule(
        LAYER + "self_attention.k_layernorm.weight",
        copy,
        {HF_LAYER + "self_attn.k_norm.weight": "head"},
    ),
)
MLP_NORM = "post_attention_layernorm.weight"
GATED_MLP = (
    Rule(
        LAYER + "mlp.linear_fc1.weight",
        gate_up,
        {
            HF_LAYER + "mlp.gate_proj.weight": "ffn hidden",
            HF_LAYER + "mlp.up_proj.weight": "ffn hidden",
        },
        present="dense layers",
    ),
    Rule(
        LAYER + "mlp.linear_fc2.weight",
        row,
        {HF_LAYER + "mlp.down_proj.weight": "hidden ffn"},
        present="dense layers",
    ),
)


def mlp_norm(hf_name: str) -> Rule:
    """The norm before a dense MLP, which some families call otherwise."""
    return Rule(
        LAYER + "pre_mlp_layernorm.weight",
        copy,
        {HF_LAYER + hf_name: "hidden"},
        fused=LAYER + "mlp.linear_fc1.layer_norm_weight",
        present="dense layers",
    )


DENSE_MLP = (*GATED_MLP, mlp_norm(MLP_NORM))

LLAMA = Family("llama", (*EMBEDDINGS, *ATTENTION, *DENSE_MLP))
MISTRAL = Family("mistral", LLAMA.rules)
QWEN2 = Family("qwen2", (*LLAMA.rules, *QKV_BIAS))
QWEN3 = Family("qwen3", (*LLAMA.rules, *QK_NORM))
