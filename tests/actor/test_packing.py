"""Packing on the host: what bins hold, how packs are laid out, and that ranks' parts make the whole."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.actor.grid import Axis, Grid
from megatron_a3po.actor.packing import AlignedSequence, MicroBatch, balance, micro_batches
from megatron_a3po.errors import InputError
from megatron_a3po.trainer.batch import supervised_sequence

MAX_TOKENS = 40
NO_GROUP: Any = None
lengths_of_sequences = st.lists(st.integers(2, MAX_TOKENS), min_size=1, max_size=40)


def grid_of(*, tp_rank: int = 0, tp_size: int = 1, dp_rank: int = 0, dp_size: int = 1) -> Grid:
    return Grid(
        world_rank=0,
        world_size=tp_size * dp_size,
        device=torch.device("cpu"),
        tp=Axis(tp_rank, tp_size, NO_GROUP),
        pp=Axis(0, 1, NO_GROUP),
        dp=Axis(dp_rank, dp_size, NO_GROUP),
        ep=Axis(0, 1, NO_GROUP),
        host_group=NO_GROUP,
        patience_s=1.0,
    )


def sequences_of(lengths: list[int]) -> list[AlignedSequence]:
    """Every token of all sequences is another number; the first of each is its prompt."""
    firsts = np.cumsum([1, *lengths])
    tokens = [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=False)]
    return [supervised_sequence(f"sequence {i}", one[:1], one[1:]) for i, one in enumerate(tokens)]


def packed(lengths: list[int], grid: Grid, *, multiple: int = 1, sp: bool = False) -> list[MicroBatch]:
    return micro_batches(
        sequences_of(lengths), grid, max_tokens=MAX_TOKENS, multiple=multiple, sequence_parallel=sp
    )


@given(lengths_of_sequences, st.integers(1, 4), st.integers(1, 3))
def test_bins_hold_every_sequence_once_within_the_limit(lengths: list[int], num_ranks: int, multiple: int):
    sequences = sequences_of(lengths)
    bins = balance(sequences, MAX_TOKENS, num_ranks=num_ranks, multiple=multiple)
    assert sorted(s.name for one in bins for s in one) == sorted(s.name for s in sequences)
    assert all(sum(map(len, one)) <= MAX_TOKENS for one in bins)
    assert len(bins) % (num_ranks * multiple) == 0
    places = {s.name: i for i, s in enumerate(sequences)}
    assert all(one == sorted(one, key=lambda s: places[s.name]) for one in bins)


@given(lengths_of_sequences)
def test_bins_are_few_and_nearly_equal(lengths: list[int]):
    sizes = [sum(map(len, one)) for one in balance(sequences_of(lengths), MAX_TOKENS, num_ranks=1)]
    # Longest first into the emptiest: the fullest bin was the emptiest one before it got its last sequence.
    assert max(sizes) - min(sizes) <= max(lengths)
    # And with one bin fewer something would have overflowed: bins are on average more than half full.
    assert len(sizes) == 1 or sum(sizes) * 2 > MAX_TOKENS * (len(sizes) - 1)


def test_a_sequence_over_the_limit_is_named_with_the_mend():
    with pytest.raises(
        InputError, match=r"sequence 1 has 41 tokens.*max_tokens_per_micro_batch=40.*at least 41"
    ):
        packed([3, 41], grid_of())


@given(lengths_of_sequences, st.integers(1, 3), st.booleans(), st.integers(1, 2))
def test_ranks_have_as_many_packs_of_one_length(lengths: list[int], dp_size: int, sp: bool, multiple: int):
    ranks = [
        packed(lengths, grid_of(dp_rank=rank, dp_size=dp_size, tp_size=2), sp=sp, multiple=multiple)
        for rank in range(dp_size)
    ]
    assert len({len(packs) for packs in ranks}) == 1
    assert len(ranks[0]) % multiple == 0
    (rows,) = {pack.tokens.shape[1] for packs in ranks for pack in packs}
    assert rows % 2 == 0
    assert rows <= MAX_TOKENS
    names = sorted(s.name for packs in ranks for pack in packs for s in pack.sequences)
    assert names == sorted(f"sequence {i}" for i in range(len(lengths)))
    assert sum(pack.denominator for packs in ranks for pack in packs) == sum(lengths) - len(lengths)


@given(lengths_of_sequences)
def test_fields_meet_the_token_they_score(lengths: list[int]):
    for pack in packed(lengths, grid_of()):
        tokens = pack.tokens[0]
        # Token ids count on within a sequence, so the label of a row is its token plus one.
        assert torch.equal(pack.fields.labels, tokens[pack.rows.local] + 1)
        assert pack.packed.cu_seqlens_q.tolist() == np.cumsum([0, *pack.packed.lengths]).tolist()
        starts = pack.packed.cu_seqlens_q[:-1]
        assert (pack.position_ids[0][starts] == 0).all()
        used = sum(pack.packed.lengths)
        assert (tokens[used:] == 0).all()
        assert pack.fields.num_sequences == len(pack.sequences)
        assert (sequence_ids := pack.fields.sequence_ids) is not None
        for index in range(len(pack.fields.labels)):
            name, position = pack.trained_token(index)
            sequence = next(s for s in pack.sequences if s.name == name)
            assert sequence.tokens[position] == pack.fields.labels[index]
            assert pack.sequences[int(sequence_ids[index])] is sequence


@given(lengths_of_sequences, st.sampled_from([2, 4]))
def test_slices_of_sequence_parallel_ranks_make_the_pack(lengths: list[int], tp_size: int):
    whole = packed(lengths, grid_of(tp_size=tp_size))
    ranks = [packed(lengths, grid_of(tp_rank=rank, tp_size=tp_size), sp=True) for rank in range(tp_size)]
    for number, pack in enumerate(whole):
        shard = pack.tokens.shape[1] // tp_size
        parts = [packs[number].rows for packs in ranks]
        assert all(rows.counts == tuple(len(part.local) for part in parts) for rows in parts)
        put_together = torch.cat([part.local + rank * shard for rank, part in enumerate(parts)])
        assert torch.equal(put_together, pack.rows.local)


def test_a_rank_without_sequences_still_has_a_pack():
    packs = packed([5], grid_of(dp_rank=1, dp_size=2))
    assert [len(pack.sequences) for pack in packs] == [0]
    assert packs[0].packed.lengths == (5,)
    assert packs[0].rows.total == 0
    assert packs[0].fields.num_sequences == 0
    assert packs[0].denominator == 0
    with pytest.raises(IndexError):
        packs[0].trained_token(0)
