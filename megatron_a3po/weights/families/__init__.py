"""One table per model family: Megatron-Core name -> Hugging Face names and the operation between them."""

from megatron_a3po.weights.families import qwen2
from megatron_a3po.weights.families.base import Family, Rule

FAMILIES: dict[str, Family] = {"qwen2": qwen2.FAMILY}

__all__ = ["FAMILIES", "Family", "Rule"]
