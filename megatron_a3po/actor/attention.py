"""Attention within the sequences of a pack: the core of a layer's self-attention, in place of Megatron-Core's.

Packed sequences keep Megatron's plain [tokens, 1, heads, head_dim] format all through the block; only the classes here
know where one sequence ends and the next begins. Which layers see only a window is TransformerConfig's `window_size`
and `window_attn_skip_freq`. Rotary embeddings come per position from the model (`rotary.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the sequences of a pack lie: `lengths` on the host, `cu_seqlens_q` int32 [sequences + 1] on the device.

    Rows past the last sequence are padding; attention leaves zeros there. `num_tokens` counts real tokens: a pack
    without a sequence attends over its padding, so that it can run beside its peers.
    """

    lengths: tuple[int, ...] = ()
    num_tokens: int = 0


def has_window(config: TransformerConfig, layer_number: int) -> bool:
    """Whether layer `layer_number` (from 1) sees only a window."""
    skipped: Any = config.window_attn_skip_freq
    return is_layer_window_attention(config.window_size, skipped, layer_number)


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a pack, by torch's scaled-dot-product kernels.

    Sequences of like lengths run as one right-padded batch: a causal mask hides what follows a sequence from it.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        # How many tokens before itself a token sees; -1: all.
        self.looks_back = (
            config.window_size[0] if has_window(config, layer_number) and config.window_size else -1
        )

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
            window_size=(self.looks_back, 0),
            enable_gqa=qkv[0].shape[1] != qkv[1].shape[1],
        )
        return out

    def _padded_batch(self, qkv: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
        padded = [torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True) for x in qkv]
        out = self._attend(*padded)
        return torch.cat([sequence[:length] for sequence, length in zip(out, lengths, strict=True)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[sequences, length, heads, dim] -> the same."""
        window = self._window(query.shape[1], query.device)
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=window,
            is_causal=window is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)

    def _window(self, length: int, device: torch.device) -> Tensor | None:
        """What each token of a sequence sees [length, length], where that is less than all before it."""
        if self.looks_back < 0 or length <= self.looks_back + 1:
            return None
        position = torch.arange(length, device=device)
        before = position[:, None] - position
        return (before >= 0) & (before <= self.looks_back)


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
