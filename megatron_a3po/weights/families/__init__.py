"""One table per model family: Megatron-Core name -> Hugging Face tensors and the operation between them."""

from megatron_a3po.config import ModelShape
from megatron_a3po.weights.families import deepseek_v3, gemma3, llama, qwen3_moe
from megatron_a3po.weights.families.base import Family, Parameter, Rule, Table

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        deepseek_v3.DEEPSEEK_V3,
        gemma3.GEMMA3,
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        qwen3_moe.QWEN3_MOE,
    )
}

__all__ = ["FAMILIES", "Family", "Parameter", "Rule", "Table", "table_of"]


def table_of(shape: ModelShape) -> Table:
    """Every parameter of a model of this shape."""
    return Table(FAMILIES[shape.model_type], shape)
