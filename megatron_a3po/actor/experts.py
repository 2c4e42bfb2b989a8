"""Mixtures of experts: what Megatron-Core is told of them, and how their tensors are called.

Experts are computed one after the other (SequentialMLP), routing is dropless and in fp32, tokens travel by all-to-all.
They can be loaded, converted and evaluated, not yet trained: nothing here balances their load.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_a3po.config import ModelShape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.errors import InputError

LOCAL_EXPERT = re.compile(r"(\.local_experts\.)(\d+)\.")

if not hasattr(moe_utils, "te_general_gemm"):
    # Without Transformer Engine, Megatron-Core 0.16 still asks whether this is None.
    moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


def expert_settings(actor: ActorSection, shape: ModelShape) -> dict[str, Any]:
    """What TransformerConfig says of the experts; nothing where the model has none."""
    experts = shape.experts
    if experts is None:
        return {}
    tp_size, ep_size = actor.tensor_model_parallel_size, actor.expert_model_parallel_size
    must_divide("expert_model_parallel_size", ep_size, {"experts": experts.num_experts})
    sizes = {
        "attention heads": shape.num_attention_heads,
        # Latent attention has keys and values for each of its heads.
        "key-value heads": None if shape.latent_attention else shape.num_query_groups,
        "expert columns": experts.ffn_hidden_size,
        "shared columns": experts.shared_ffn_hidden_size,
    }
    must_divide("tensor_model_parallel_size", tp_size, sizes)
    softmax = experts.scores == "softmax"
    limited = (
        None not in (experts.num_groups, experts.top_groups) and experts.top_groups != experts.num_groups
    )
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_layer_freq": [int(sparse) for sparse in shape.sparse_layers],
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.scores,
        # A softmax over the chosen experts alone is a softmax over all of them, normalised over the chosen.
        "moe_router_pre_softmax": softmax and not experts.normalize_top_k,
        "moe_router_topk_scaling_factor": None if experts.scaling == 1 else experts.scaling,
        "moe_router_num_groups": experts.num_groups if limited else None,
        "moe_router_group_topk": experts.top_groups if limited else None,
        "moe_router_enable_expert_bias": experts.has_score_bias,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": ep_size,
        # Also where the grid is laid: set in one place only, the experts' outputs would be summed wrongly, in silence.
        "expert_tensor_parallel_size": tp_size,
    }


def must_divide(key: str, num_ranks: int, sizes: dict[str, int | None]) -> None:
    """Errors: InputError names everything that so many ranks cannot share evenly."""
    if problems := [
        f"actor.{key} is {num_ranks}, but must divide the model's {size} {what}: take a divisor."
        for what, size in sizes.items()
        if size is not None and size % num_ranks
    ]:
        raise InputError(problems)


def keep_score_bias_in_fp32(stage: torch.nn.Module) -> None:
    """Half precision of the stage must not round what decides between experts, neither now nor on load."""
    for module in stage.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()


def score_biases(stage: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The biases that steer the choice of experts: Megatron-Core keeps them as buffers, checkpoints as tensors."""
    return ((name, buffer) for name, buffer in stage.named_buffers() if name.endswith(".router.expert_bias"))


def count_experts_from(first: int, name: str) -> str:
    """`name` with its expert, counted on this rank, counted from `first`; other names as they are."""
    return LOCAL_EXPERT.sub(lambda found: f"{found[1]}{first + int(found[2])}.", name)
