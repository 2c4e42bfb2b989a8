"""Qwen3-MoE: Qwen3 with a router and experts in place of the MLP in its sparse layers."""

from megatron_a3po.weights.families.base import EXPERT, HF_LAYER, LAYER, Family, Rule
from megatron_a3po.weights.families.llama import MLP_NORM, QWEN3
from megatron_a3po.weights.operations import copy, gate_up, row

HF_EXPERT = HF_LAYER + "mlp.experts.{e}."

EXPERTS = (
    Rule(
        LAYER + "pre_mlp_layernorm.weight",
        copy,
        {HF_LAYER + MLP_NORM: "hidden"},
        present="sparse layers",
    ),
    Rule(
        LAYER + "mlp.router.weight",
        copy,
        {HF_LAYER + "mlp.gate.weight": "experts hidden"},
        present="sparse layers",
    ),
    Rule(
        EXPERT + "linear_fc1.weight",
        gate_up,
        {
            HF_EXPERT + "gate_proj.weight": "expert_ffn hidden",
            HF_EXPERT + "up_proj.weight": "expert_ffn hidden",
        },
        present="sparse layers",
    ),
    Rule(
        EXPERT + "linear_fc2.weight",
        row,
        {HF_EXPERT + "down_proj.weight": "hidden expert_ffn"},
        present="sparse layers",
    ),
)

QWEN3_MOE = Family("qwen3_moe", (*QWEN3.rules, *EXPERTS))
