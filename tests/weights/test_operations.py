"""Each operation of the weight tables: shards that merge to the same bits, laid out as Megatron-Core expects them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_a3po.config import ModelShape
from megatron_a3po.config.model_shape import Rope
from megatron_a3po.weights.operations import Layout, Operation, copy, gate_up, qkv, row, vocabulary

HIDDEN = 6
tensor_ranks = st.sampled_from([1, 2, 4])


def shape_of(*, groups: int = 4, heads_per_group: int = 1, vocab_size: int = 8, ffn: int = 8) -> ModelShape:
    return ModelShape(
        model_type="qwen2",
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        head_dim=2,
        vocab_size=vocab_size,
        max_position_embeddings=16,
        rope=Rope(),
        norm_eps=1e-6,
        tie_word_embeddings=False,
        add_qkv_bias=True,
        initializer_range=0.02,
        eos_token_ids=(1,),
    )


def shards_of(operation: Operation, sources: list[Tensor], shape: ModelShape, tp_size: int) -> list[Tensor]:
    padded = -(-shape.vocab_size // tp_size) * tp_size
    return [operation.shard(sources, Layout(shape, padded, rank, tp_size)) for rank in range(tp_size)]


def assert_merges_back(
    operation: Operation, sources: list[Tensor], shape: ModelShape, tp_size: int
) -> list[Tensor]:
    shards = shards_of(operation, sources, shape, tp_size)
    merged = operation.merge(shards, shape)
    assert len(merged) == len(sources)
    assert all(torch.equal(found, source) for found, source in zip(merged, sources, strict=True))
    return shards


@given(tensor_ranks, st.integers(1, 3), st.sampled_from([(), (HIDDEN,)]))
def test_qkv_is_grouped_queries_then_key_then_value(
    tp_size: int, heads_per_group: int, columns: tuple[int, ...]
):
    shape = shape_of(heads_per_group=heads_per_group)
    heads = {"q": 4 * heads_per_group, "k": 4, "v": 4}
    sources = [torch.randn(number * shape.head_dim, *columns) for number in heads.values()]
    shards = assert_merges_back(qkv, sources, shape, tp_size)
    q, k, v = (source.unflatten(0, (-1, shape.head_dim)) for source in sources)
    expected = []
    for group in range(4):
        expected += [*q[group * heads_per_group : (group + 1) * heads_per_group], k[group], v[group]]
    assert torch.equal(torch.cat(shards), torch.cat(expected))


@given(tensor_ranks)
def test_gate_and_up_are_stacked_on_each_rank(tp_size: int):
    sources = [torch.randn(8, HIDDEN), torch.randn(8, HIDDEN)]
    shards = assert_merges_back(gate_up, sources, shape_of(ffn=8), tp_size)
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, torch.cat([source.chunk(tp_size)[rank] for source in sources]))


@given(tensor_ranks, st.integers(1, 13))
def test_the_vocabulary_is_padded_with_zeros(tp_size: int, vocab_size: int):
    source = torch.randn(vocab_size, HIDDEN)
    shards = assert_merges_back(vocabulary, [source], shape_of(vocab_size=vocab_size), tp_size)
    assert len({shard.shape for shard in shards}) == 1
    assert not torch.cat(shards)[vocab_size:].any()


@given(tensor_ranks)
def test_rows_are_split_along_the_input(tp_size: int):
    shards = assert_merges_back(row, [torch.randn(HIDDEN, 8)], shape_of(), tp_size)
    assert all(shard.shape == (HIDDEN, 8 // tp_size) for shard in shards)


@given(tensor_ranks)
def test_replicas_are_whole(tp_size: int):
    assert_merges_back(copy, [torch.randn(HIDDEN)], shape_of(), tp_size)


def test_a_replica_that_drifted_is_an_error():
    with pytest.raises(AssertionError, match="tensor ranks 0 and 2"):
        copy.merge([torch.zeros(2), torch.zeros(2), torch.ones(2)], shape_of())
