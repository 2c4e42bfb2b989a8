"""What a family is: a table of rules. A new family is a table, not code.

A rule ties one parameter of Megatron-Core to the Hugging Face tensors it is made of, with their sizes by name, so that
the table alone, for a shape, lists every tensor there must be: what random weights are drawn for, what is refused as
unknown, and what a checkpoint is converted by without building a model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megatron_a3po.config import ModelShape
from megatron_a3po.weights.operations import Operation

FURTHER_LAYER = re.compile(r"model\.layers\.(\d+)\.")
LAYER = "decoder.layers.{i}."
HF_LAYER = "model.layers.{i}."
EXPERT = LAYER + "mlp.experts.local_experts.{e}."

Presence = Literal["always", "untied", "dense layers", "sparse layers", "query rank", "no query rank"]


@dataclass(frozen=True)
class Rule:
    """A Megatron-Core parameter and what it is made of.

    megatron: its name, `{i}` being the layer over all pipeline stages, `{e}` the expert over all expert ranks.
    hugging_face: tensor names and their sizes in the operation's order: {"lm_head.weight": "vocab hidden"}.
    fused: its name under Transformer Engine where that differs, which is also the name distributed checkpoints use.
    present: what it needs to be there.
    keeps_dtype: a change of precision leaves it as it is.
    """

    megatron: str
    operation: Operation
    hugging_face: Mapping[str, str]
    fused: str | None = None
    present: Presence = "always"
    keeps_dtype: bool = False


@dataclass(frozen=True)
class Parameter:
    """A rule filled in for one layer and expert."""

    name: str
    fused_name: str
    layer: int | None
    expert: int | None
    operation: Operation
    tensors: Mapping[str, tuple[int, ...]]  # Hugging Face name -> shape
    keeps_dtype: bool = False

    def dtype(self, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
        """Its precision where `wanted` is asked for, None being the one it has."""
        return own if wanted is None or self.keeps_dtype else wanted


@dataclass(frozen=True)
class Family:
    """The rules of one Hugging Face `model_type`.

    further_layers: checkpoints may have layers behind the model's last, which are no part of the policy.
    """

    model_type: str
    rules: tuple[Rule, ...]
    further_layers: bool = False


class Table:
    """A family's rules for one shape: every parameter of the model, found by either of its names."""

    def __init__(self, family: Family, shape: ModelShape) -> None:
        self.family, self.shape = family, shape
        self.parameters = tuple(_parameters(family, shape))

    @cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {name: one for one in self.parameters for name in (one.name, one.fused_name)}

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model and its shape."""
        return {name: size for one in self.parameters for name, size in one.tensors.items()}

    def parameter(self, name: str) -> Parameter:
        """The parameter of this Megatron-Core name, layers and experts numbered over all ranks."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(
                f"the {self.family.model_type} table has no rule for the parameter {name}"
            ) from None

    def leaves_out(self, name: str) -> bool:
        """Whether a checkpoint may hold this Hugging Face tensor although the policy has nothing for it."""
        layer = FURTHER_LAYER.match(name)
        return self.family.further_layers and layer is not None and int(layer[1]) >= self.shape.num_layers

    def on_expert_ranks(self, name: str, ep_size: int) -> list[str]:
        """The parameter's name; an expert's: that of the expert with the same place on every expert rank."""
        expert, experts = self.parameter(name).expert, self.shape.experts
        if expert is None or experts is None:
            return [name]
        num_local = experts.num_experts // ep_size
        others = [rank * num_local + expert % num_local for rank in range(ep_size)]
        return [name.replace(f".local_experts.{expert}.", f".local_experts.{other}.") for other in others]


def sizes(shape: ModelShape) -> dict[str, int]:
    """What the words of a table mean."""
    found = {
        "hidden": shape.hidden_size,
        "vocab": shape.vocab_size,
        "ffn": shape.ffn_hidden_size,
        "query": shape.num_attention_heads * shape.head_dim,
        "key_value": shape.num_query_groups * shape.head_dim,
        "head": shape.head_dim,
    }
    if (experts := shape.experts) is not None:
        found |= {
            "experts": experts.num_experts,
            "expert_ffn": experts.ffn_hidden_size,
            "shared_ffn": experts.shared_ffn_hidden_size or 0,
        }
    if (latent := shape.latent_attention) is not None:
        heads = shape.num_attention_heads
        found |= {
            "query_rank": latent.query_rank or 0,
            "key_value_rank": latent.key_value_rank,
            "key_value_down": latent.key_value_rank + latent.rotary_head_dim,
            "key_value_up": heads * (latent.plain_head_dim + latent.value_head_dim),
            "value": heads * latent.value_head_dim,
        }
    return found


def _parameters(family: Family, shape: ModelShape) -> Iterator[Parameter]:
    known = sizes(shape)
    for rule in family.rules:
        for layer in range(shape.num_layers) if "{i}" in rule.megatron else [None]:
            if not _is_present(rule.present, layer, shape):
                continue
            for expert in range(known["experts"]) if "{e}" in rule.megatron else [None]:
                yield _filled_in(rule, layer, expert, known)


def _is_present(present: Presence, layer: int | None, shape: ModelShape) -> bool:
    match present:
        case "always":
            return True
        case "untied":
            return not shape.tie_word_embeddings
        case "dense layers" | "sparse layers":
            return layer is not None and shape.is_sparse(layer) == (present == "sparse layers")
        case "query rank" | "no query rank":
            latent = shape.latent_attention
            has_rank = latent is not None and latent.query_rank is not None
            return has_rank == (present == "query rank")


def _filled_in(rule: Rule, layer: int | None, expert: int | None, known: dict[str, int]) -> Parameter:
    def named(pattern: str) -> str:
        return pattern.replace("{i}", str(layer)).replace("{e}", str(expert))

    return Parameter(
        name=named(rule.megatron),
        fused_name=named(rule.fused or rule.megatron),
        layer=layer,
        expert=expert,
        operation=rule.operation,
        keeps_dtype=rule.keeps_dtype,
        tensors={
            named(name): tuple(known[word] for word in dims.split())
            for name, dims in rule.hugging_face.items()
        },
    )
