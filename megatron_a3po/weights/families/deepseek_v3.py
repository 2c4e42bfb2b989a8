"""DeepSeek-V3: multi-head latent attention, and experts, some of them shared by all tokens.

A checkpoint's layers behind `num_hidden_layers` predict further tokens. They are no part of the policy: they are left
out, with a warning on load, and so are not in what is written.
"""

from megatron_a3po.weights.families.base import HF_LAYER, LAYER, Family, Rule
from megatron_a3po.weights.families.llama import DENSE_MLP, EMBEDDINGS
from megatron_a3po.weights.families.qwen3_moe import EXPERTS
from megatron_a3po.weights.operations import column, copy, gate_up, row

ATTENTION = (
    Rule(LAYER + "input_layernorm.weight", copy, {HF_LAYER + "input_layernorm.weight": "hidden"}),
    Rule(
        LAYER + "self_attention.linear_kv_down_proj.weight",
        column,
        {HF_LAYER + "self_attn.kv_a_proj_with_mqa.weight": "key_value_down hidden"},
    ),
    Rule(
        LAYER + "self_attention.kv_layernorm.weight",
        copy,
        {HF_LAYER + "self_attn.kv_a_layernorm.weight": "key_value_rank"},
    ),
    Rule(
        LAYER + "self_attention.linear_kv_up_proj.weight",
        column,
        {HF_LAYER + "self_attn.kv_b_proj.weight": "key_value_up key_value_rank"},
    ),
    Rule(
        LAYER + "self_attention.linear_proj.weight",
        row,
        {HF_LAYER + "self_attn.o_proj.weight": "hidden value"},
    ),
)
QUERIES = (
    Rule(
        LAYER + "self_attention.linear_q_proj.weight",
        column,
        {HF_LAYER + "self_attn.q_proj.weight": "query hidden"},
        present="no query rank",
    ),
    Rule(
        LAYER + "self_attention.linear_q_down_proj.weight",
        column,
        {HF_LAYER + "self_attn.q_a_proj.weight": "query_rank hidden"},
        present="query rank",
    ),
    Rule(
        LAYER + "self_attention.q_layernorm.weight",
        copy,
        {HF_LAYER + "self_attn.q_a_layernorm.weight": "query_rank"},
        present="query rank",
    ),
    Rule(
        LAYER + "self_attention.linear_q_up_proj.weight",
        column,
        {HF_LAYER + "self_attn.q_b_proj.weight": "query query_rank"},
        present="query rank",
    ),
)
SCORE_BIAS = (
    Rule(
        LAYER + "mlp.router.expert_bias",
        copy,
        {HF_LAYER + "mlp.gate.e_score_correction_bias": "experts"},
        present="sparse layers",
        keeps_dtype=True,
    ),
)
SHARED_EXPERTS = (
    Rule(
        LAYER + "mlp.shared_experts.linear_fc1.weight",
        gate_up,
        {
            HF_LAYER + "mlp.shared_experts.gate_proj.weight": "shared_ffn hidden",
            HF_LAYER + "mlp.shared_experts.up_proj.weight": "shared_ffn hidden",
        },
        present="sparse layers",
    ),
    Rule(
        LAYER + "mlp.shared_experts.linear_fc2.weight",
        row,
        {HF_LAYER + "mlp.shared_experts.down_proj.weight": "hidden shared_ffn"},
        present="sparse layers",
    ),
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    (*EMBEDDINGS, *ATTENTION, *QUERIES, *DENSE_MLP, *EXPERTS, *SCORE_BIAS, *SHARED_EXPERTS),
    further_layers=True,
)
