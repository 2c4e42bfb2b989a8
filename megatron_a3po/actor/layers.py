"""The parts of a layer that Megatron-Core lacks without Transformer Engine, and the spec that puts them in place.

Packed sequences keep Megatron's plain [tokens, 1, heads, head_dim] format all through the block; only the core
attention knows where one sequence ends and the next begins. Rotary embeddings come per position from the model.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_a3po.config import ModelShape


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the sequences of a pack lie: `lengths` on the host, `cu_seqlens_q` int32 [sequences + 1] on the device.

    Rows past the last sequence are padding; attention leaves zeros there. `num_tokens` counts real tokens: a pack
    without a sequence attends over its padding, so that it can run beside its peers.
    """

    lengths: tuple[int, ...] = ()
    num_tokens: int = 0


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism: its weight's gradient is summed over the tensor axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a pack, by torch's scaled-dot-product kernels.

    Sequences of like lengths run as one right-padded batch: a causal mask hides what follows a sequence from it.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
        **_: Any,
    ) -> Tensor:
        """query [tokens, 1, heads, dim], key and value [tokens, 1, groups, dim] -> [tokens, 1, heads * dim]."""
        lengths = packed_seq_params.lengths
        rows, heads = query.shape[0], query.shape[2]
        used = sum(lengths)
        qkv = [x[:used, 0] for x in (query, key, value)]
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            out = self._variable_length_kernel(qkv, packed_seq_params)
        elif max(lengths) * len(lengths) <= 2 * used:
            out = self._padded_batch(qkv, lengths)
        else:
            split = [x.split(lengths) for x in qkv]
            out = torch.cat([self._attend(*(x[None] for x in one))[0] for one in zip(*split, strict=True)])
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, rows - used))
        return out.reshape(rows, 1, heads * value.shape[-1])

    def _variable_length_kernel(self, qkv: list[Tensor], packed: PackedSequences) -> Tensor:
        """FlashAttention as torch ships it: CUDA, half precision only."""
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, longest = packed.cu_seqlens_q, max(packed.lengths)
        out: Any = varlen_attn(
            *qkv,
            cu_seq_q=cu_seqlens,
            cu_seq_k=cu_seqlens,
            max_q=longest,
            max_k=longest,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            enable_gqa=qkv[0].shape[1] != qkv[1].shape[1],
        )
        return out

    def _padded_batch(self, qkv: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
        padded = [torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True) for x in qkv]
        out = self._attend(*padded)
        return torch.cat([sequence[:length] for sequence, length in zip(out, lengths, strict=True)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[sequences, length, heads, dim] -> the same."""
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)


class TransformerEngineAttention(torch.nn.Module):
    """PackedAttention by Transformer Engine's kernels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.kernel = TEDotProductAttention(**kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
        **_: Any,
    ) -> Tensor:
        """Shapes as in PackedAttention."""
        rows, used = query.shape[0], sum(packed_seq_params.lengths)
        cu_seqlens, longest = packed_seq_params.cu_seqlens_q, max(packed_seq_params.lengths)
        out: Any = self.kernel(
            *(x[:used, 0].contiguous() for x in (query, key, value)),
            None,
            attn_mask_type=AttnMaskType.padding_causal,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
        )
        return torch.nn.functional.pad(out.reshape(used, -1), (0, 0, 0, rows - used)).unsqueeze(1)


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()


def block_spec(
    shape: ModelShape,
    config: TransformerConfig,
    *,
    vp_stage: int | None,
    pp_rank: int,
    transformer_engine: bool,
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage, each by its number over the whole model."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm as FinalNorm
    else:
        FinalNorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(shape, layer, transformer_engine) for layer in range(first, first + num_layers)
        ],
        layer_norm=cast(Any, FinalNorm),
    )


def layer_spec(shape: ModelShape, layer: int, transformer_engine: bool) -> ModuleSpec:
    """Layer number `layer` (from 0) of the model.

    Source: get_gpt_layer_local_spec or get_gpt_layer_with_transformer_engine_spec, core attention (and norms) replaced.
    """
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    parts: Any = spec.submodules
    attention: Any = parts.self_attention.submodules
    if transformer_engine:
        attention.core_attention = TransformerEngineAttention
        return spec
    attention.core_attention = PackedAttention
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
