"""Attention within a pack against a softmax written out in float64: windows, scales, every way it is computed."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_a3po.actor.attention import PackedAttention, PackedSequences

HEADS, GROUPS, DIM = 4, 2, 16
# By itself, as a right-padded batch, sequence by sequence.
LENGTHS = [[9], [7, 9, 8], [1, 2, 23, 4, 1]]


def attention_of(layer_number: int, window: int | None, scale: float | None = None) -> PackedAttention:
    """Of a model whose first layer has the window and whose second has none."""
    windows = {} if window is None else {"window_size": (window - 1, 0), "window_attn_skip_freq": [1, 0]}
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=HEADS, **windows)  # pyright: ignore[reportArgumentType]
    return PackedAttention(config, layer_number, softmax_scale=scale)


def written_out(qkv: list[Tensor], lengths: list[int], window: int, scale: float) -> Tensor:
    """Token i of a sequence sees tokens i - window + 1 to i."""
    outputs = []
    for query, key, value in zip(*(x[:, 0].double().split(lengths) for x in qkv), strict=True):
        for i in range(len(query)):
            seen = slice(max(0, i - window + 1), i + 1)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                weights = (scale * key[seen, group] @ query[i, head]).softmax(0)
                outputs.append(weights @ value[seen, group])
    return torch.stack(outputs).reshape(sum(lengths), 1, HEADS * DIM)


def random_pack(lengths: list[int], padding: int) -> tuple[list[Tensor], PackedSequences]:
    generator = torch.Generator().manual_seed(1)
    rows = sum(lengths) + padding
    qkv = [torch.randn(rows, 1, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return qkv, PackedSequences(
        qkv_format="sbhd", cu_seqlens_q=ends, lengths=tuple(lengths), num_tokens=sum(lengths)
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [1, 3, 8, 9, 100])
def test_a_token_sees_itself_and_what_is_left_of_the_window(lengths: list[int], window: int):
    qkv, pack = random_pack(lengths, padding=2)
    used = sum(lengths)
    for layer_number, sees in ((1, window), (2, 1000)):
        found = attention_of(layer_number, window)(*qkv, packed_seq_params=pack)
        expected = written_out([x[:used] for x in qkv], lengths, sees, DIM**-0.5)
        torch.testing.assert_close(found[:used].double(), expected, atol=1e-6, rtol=0)
        assert not found[used:].any()


def test_the_scale_is_the_models():
    qkv, pack = random_pack([9], padding=0)
    found = attention_of(1, None, scale=0.5)(*qkv, packed_seq_params=pack)
    torch.testing.assert_close(found.double(), written_out(qkv, [9], 1000, 0.5), atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_the_variable_length_kernel_agrees(lengths: list[int], window: int | None):
    qkv, pack = random_pack(lengths, padding=2)
    half = [x.cuda().bfloat16() for x in qkv]
    assert pack.cu_seqlens_q is not None
    pack.cu_seqlens_q = pack.cu_seqlens_q.cuda()
    found = attention_of(1, window)(*half, packed_seq_params=pack)[: sum(lengths)]
    used = [x[: sum(lengths)].cpu() for x in half]
    expected = written_out(used, lengths, window or 1000, DIM**-0.5)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-2, rtol=0)
