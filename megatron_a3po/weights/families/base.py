"""What a family is: a list of rules. A new family is a table, not code."""

import re
from dataclasses import dataclass

from megatron_a3po.weights.operations import Operation


@dataclass(frozen=True)
class Rule:
    """A Megatron-Core parameter and the Hugging Face tensors it is made of; `{i}` is the layer over all stages."""

    megatron: str
    hugging_face: tuple[str, ...]
    operation: Operation


@dataclass(frozen=True)
class Family:
    """The rules of one Hugging Face `model_type`. Both namings of norms (plain and fused) have a rule of their own."""

    model_type: str
    rules: tuple[Rule, ...]

    def rule(self, name: str) -> tuple[Rule, tuple[str, ...]]:
        """The rule of a Megatron-Core name with global layer numbers, and its Hugging Face names filled in."""
        for rule in self.rules:
            pattern = re.escape(rule.megatron).replace(r"\{i\}", r"(\d+)")
            if match := re.fullmatch(pattern, name):
                layer = match.group(1) if match.groups() else ""
                return rule, tuple(hf.replace("{i}", layer) for hf in rule.hugging_face)
        raise KeyError(f"the {self.model_type} table has no rule for the parameter {name}")
