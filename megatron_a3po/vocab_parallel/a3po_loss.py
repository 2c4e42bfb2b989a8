"""The layer as one call for any trainer: hidden states and a vocabulary shard in, everything of the loss out.

    rows = TrainedRows.of_mask(mask)                            # which rows are trained; on the host where it can be
    fields = TokenFields(labels, behave_logp, staleness, advantages, loss_weights)        # of those rows, in order
    found = a3po_loss(hidden, weight, rows, fields, group=tensor_parallel_group)
    (found.loss / number_of_trained_tokens).backward()          # without a main gradient any scalar is right

Nothing of Megatron is needed, nor of the rest of this package. This package's own actor calls `vocab_parallel_loss`
below it, which leaves the statistics to the training step.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from megatron_a3po.algorithm.policy_loss import TokenLoss
from megatron_a3po.algorithm.statistics import Statistics, policy_statistics
from megatron_a3po.vocab_parallel.chunking import choose_chunk_tokens
from megatron_a3po.vocab_parallel.collectives import Group, group_size
from megatron_a3po.vocab_parallel.inputs import refuse_matrices
from megatron_a3po.vocab_parallel.loss import vocab_parallel_loss
from megatron_a3po.vocab_parallel.policy_objective import ClippedObjective, PolicyObjective, interpolated
from megatron_a3po.vocab_parallel.sweep import Temperature
from megatron_a3po.vocab_parallel.token_fields import TokenFields
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows
from megatron_a3po.vocab_parallel.workspace import Workspace

A3PO = PolicyObjective(interpolated("loglinear"), eps_low=0.2, eps_high=0.2)
# Names of the splits, and the staleness each begins with.
STALENESS = {"0": 0, "1": 1, "2": 2, "3-4": 3, "5-8": 5, "more": 9}


@dataclass(frozen=True)
class A3POLoss:
    """The summed loss, with gradient, and what was measured on the way, without; the same on all shards' ranks."""

    loss: Float32[Tensor, ""]
    logp: Float32[Tensor, "trained"]
    entropy: Float32[Tensor, "trained"]
    statistics: (
        Statistics  # sum, count, min and max of each quantity, over all trained tokens and by staleness
    )
    first_nonfinite: Int64[Tensor, ""]  # first trained token with a number that is not finite; -1: none


def a3po_loss(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "shard hidden"],
    rows: TrainedRows,
    fields: TokenFields,
    *,
    objective: ClippedObjective = A3PO,
    group: Group = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    temperature: Temperature = 1.0,
    entropy_coef: float = 0.0,
    sweeps: Literal[1, 2] = 1,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> A3POLoss:
    """`vocab_parallel_loss`, with the method as default objective, and its statistics.

    vocab_size    where the embedding is padded: its true size
    chunk_tokens  default: from the shapes, `choose_chunk_tokens`
    workspace     the buffer of logits, kept from call to call: worth it on a CPU

    The statistics: importance_weight (r), behave_imp_weight (w), clipped, entropy and kl (k3, behaviour to target) over
    all trained tokens; the first three also as <name>/staleness_<0, 1, 2, 3-4, 5-8, more>.
    """
    refuse_matrices(hidden, weight)
    if not isinstance(objective, ClippedObjective):
        raise ValueError(
            f"objective is {objective!r}, but must be a PolicyObjective or a SequenceObjective: "
            "`vocab_parallel_loss` takes any other"
        )
    chosen = choose_chunk_tokens(hidden.shape[1], len(weight), hidden.device)
    output = vocab_parallel_loss(
        hidden,
        weight,
        rows,
        fields,
        objective,
        vocab_size=len(weight) * group_size(group) if vocab_size is None else vocab_size,
        temperature=temperature,
        tp_group=group,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chosen if chunk_tokens is None else chunk_tokens,
        entropy_coef=entropy_coef,
        sweeps=sweeps,
        workspace=workspace,
    )
    with torch.no_grad():
        token_loss = objective.token_loss(output.logp, fields)
        whole = policy_statistics(token_loss, output.logp, fields.behave_logp, output.entropy)
        statistics = whole.merge(staleness_statistics(token_loss, fields.staleness))
    return A3POLoss(output.loss, output.logp, output.entropy, statistics, output.first_nonfinite)


def staleness_statistics(token_loss: TokenLoss, staleness: Int[Tensor, "trained"]) -> Statistics:
    """Ratio, weight and clip of the tokens of each staleness apart: where the trust region is at work."""
    vectors = {
        "importance_weight": token_loss.importance_weight,
        "behave_imp_weight": token_loss.behave_imp_weight,
        "clipped": token_loss.clipped.float(),
    }
    found = Statistics.empty((), staleness.device)
    # Bounds as Python numbers: a tensor of them would be a copy to the device that the host waits for.
    starts = tuple(STALENESS.values())
    for label, first, end in zip(STALENESS, starts, (*starts[1:], None), strict=True):
        inside = staleness >= first if end is None else (staleness >= first) & (staleness < end)
        named = {f"{name}/staleness_{label}": vector for name, vector in vectors.items()}
        found = found.merge(Statistics.of(named, where=inside))
    return found
