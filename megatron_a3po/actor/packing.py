"""From aligned sequences to the packed micro-batches of one mini-batch.

Host side only: every rank computes the same plan from the same mini-batch and then builds its own packs. Which rows
are trained, and how many of them each tensor rank holds under sequence parallelism, is known here and never asked of a
device.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_a3po.actor.attention import PackedSequences
from megatron_a3po.actor.grid import Grid
from megatron_a3po.errors import InputError
from megatron_a3po.vocab_parallel import TokenFields, TrainedRows


@dataclass(frozen=True)
class AlignedSequence:
    """One trajectory as the loss meets it: position t of every field but `tokens` describes token t + 1.

    Made once per batch by the alignment function; `name` is what an error about one of its tokens says.
    """

    name: str
    tokens: Int[np.ndarray, " length"]
    labels: Int[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]
    staleness: Int[np.ndarray, " length"]
    behave_logp: Float[np.ndarray, " length"]
    advantages: Float[np.ndarray, " length"]
    loss_weights: Float[np.ndarray, " length"]
    denominator: int = 0  # what this sequence adds to the loss's denominator

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class MicroBatch:
    """The packed sequences of one forward, on the device."""

    tokens: Int[Tensor, "1 rows"]
    position_ids: Int[Tensor, "1 rows"]
    packed: PackedSequences
    rows: TrainedRows
    fields: TokenFields
    denominator: int
    sequences: tuple[AlignedSequence, ...] = field(repr=False)

    def trained_token(self, index: int) -> tuple[str, int]:
        """Name of the trajectory and position in it of the `index`-th trained token of this pack."""
        for sequence in self.sequences:
            positions = np.flatnonzero(sequence.loss_mask)
            if index < len(positions):
                return sequence.name, int(positions[index]) + 1
            index -= len(positions)
        raise IndexError(index)


def micro_batches(
    sequences: list[AlignedSequence], grid: Grid, *, max_tokens: int, multiple: int, sequence_parallel: bool
) -> list[MicroBatch]:
    """This rank's micro-batches of a mini-batch: as many on every data rank, all padded to one length.

    multiple: the schedule needs a multiple of this many micro-batches (interleaved pipelines).
    Errors: InputError where a single sequence is longer than `max_tokens`.
    """
    bins = balance(sequences, max_tokens, num_ranks=grid.dp.size, multiple=multiple)
    rows = max(sum(len(s) for s in one) for one in bins)
    rows = max(-(-rows // grid.tp.size) * grid.tp.size, grid.tp.size)
    mine = bins[grid.dp.rank :: grid.dp.size]
    return [pack(one, rows, grid, sequence_parallel=sequence_parallel) for one in mine]


def balance(
    sequences: list[AlignedSequence], max_tokens: int, *, num_ranks: int, multiple: int = 1
) -> list[list[AlignedSequence]]:
    """Split into as few bins of at most `max_tokens` as possible, near equal; bin i goes to rank i % num_ranks.

    Longest first into the emptiest bin; the order within a bin is the batch's.
    """
    longest = max(sequences, key=len)
    if len(longest) > max_tokens:
        raise InputError(
            f"{longest.name} has {len(longest)} tokens, more than actor.max_tokens_per_micro_batch={max_tokens}; "
            f"raise it to at least {len(longest)}"
        )
    step = num_ranks * multiple
    total = sum(len(s) for s in sequences)
    num_bins = -(-total // (max_tokens * step)) * step
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    while True:
        heap = [(0, b) for b in range(num_bins)]
        members: list[list[int]] = [[] for _ in range(num_bins)]
        for i in order:
            tokens, b = heapq.heappop(heap)
            members[b].append(i)
            heapq.heappush(heap, (tokens + len(sequences[i]), b))
        if max(tokens for tokens, _ in heap) <= max_tokens:
            return [[sequences[i] for i in sorted(one)] for one in members]
        num_bins += step


def pack(sequences: list[AlignedSequence], rows: int, grid: Grid, *, sequence_parallel: bool) -> MicroBatch:
    """Lay sequences end to end in `rows` rows; what is left over is padding. A pack may hold no sequence at all."""
    lengths = tuple(len(s) for s in sequences)
    used = sum(lengths)

    def laid(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(s, name).astype(dtype) for s in sequences)])

    tokens, position_ids = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    tokens[:used] = laid("tokens", np.int64)
    position_ids[:used] = np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in lengths)])
    trained = np.flatnonzero(laid("loss_mask", np.bool_))

    def of_trained(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(laid(name, dtype)[trained]).to(grid.device)

    sequence_ids = np.repeat(np.arange(len(sequences)), np.array(lengths, np.int64))[trained]
    # A pack without a sequence still runs (its peers do): all its rows are then one untrained sequence.
    attended = lengths or (rows,)
    cu_seqlens = np.concatenate([[0], np.cumsum(attended)]).astype(np.int32)
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(grid.device),
        position_ids=torch.from_numpy(position_ids)[None].to(grid.device),
        packed=PackedSequences(
            qkv_format="sbhd",
            cu_seqlens_q=torch.from_numpy(cu_seqlens).to(grid.device),
            lengths=attended,
            num_tokens=used,
        ),
        rows=_trained_rows(trained, rows, grid, sequence_parallel),
        fields=TokenFields(
            labels=of_trained("labels", np.int64),
            behave_logp=of_trained("behave_logp", np.float32),
            staleness=of_trained("staleness", np.int32),
            advantages=of_trained("advantages", np.float32),
            loss_weights=of_trained("loss_weights", np.float32),
            sequence_ids=torch.from_numpy(sequence_ids).to(grid.device),
            num_sequences=len(sequences),
        ),
        denominator=sum(s.denominator for s in sequences),
        sequences=tuple(sequences),
    )


def _trained_rows(trained: np.ndarray, rows: int, grid: Grid, sequence_parallel: bool) -> TrainedRows:
    if not sequence_parallel:
        return TrainedRows(local=torch.from_numpy(trained).to(grid.device), counts=(len(trained),))
    shard = rows // grid.tp.size
    counts = tuple(int(np.sum(trained // shard == tp_rank)) for tp_rank in range(grid.tp.size))
    mine = trained[trained // shard == grid.tp.rank] - grid.tp.rank * shard
    return TrainedRows(local=torch.from_numpy(mine).to(grid.device), counts=counts)
