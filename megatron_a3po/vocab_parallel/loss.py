"""The loss layer: from hidden states and a vocabulary shard to loss and gradients, no full logits.

`vocab_parallel_loss` in one sweep over chunks of trained tokens (`one_sweep`) or two (`two_sweeps`), and
`vocab_parallel_logp`, log-probs alone. `reference` is the same in plain dense torch; `a3po_loss` is the call for
trainers of other makes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group
from megatron_a3po.vocab_parallel.inputs import (
    refuse_fields,
    refuse_matrices,
    refuse_numbers,
    refuse_rows,
    refuse_vector,
)
from megatron_a3po.vocab_parallel.limits import refuse_recompute, refuse_too_few_sweeps
from megatron_a3po.vocab_parallel.one_sweep import OneSweep
from megatron_a3po.vocab_parallel.sweep import Sweep, Temperature
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows
from megatron_a3po.vocab_parallel.two_sweeps import TwoSweeps
from megatron_a3po.vocab_parallel.workspace import Workspace


@dataclass(frozen=True)
class LossOutput:
    """The summed loss, with gradient, and what it was made of, without; the same on all shards' ranks."""

    loss: Float32[Tensor, ""]
    logp: Float32[Tensor, "trained"]
    entropy: Float32[Tensor, "trained"]
    # First trained token with a non-finite log-prob, loss or derivative; -1: none.
    first_nonfinite: Int64[Tensor, ""]


def vocab_parallel_loss(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "shard hidden"],
    rows: TrainedRows,
    fields: TokenFields,
    objective: Objective,
    *,
    vocab_size: int,
    temperature: Temperature,
    tp_group: Group,
    sequence_parallel: bool,
    chunk_tokens: int,
    entropy_coef: float = 0.0,
    sweeps: Literal[1, 2] = 1,
    workspace: Workspace | None = None,
) -> LossOutput:
    """sum objective - entropy_coef * sum loss_weights * entropy, differentiable in `hidden` and `weight`.

    hidden        last hidden states, replicated over the group; under sequence parallelism this rank's slice
    weight        this rank's rows of the output embedding, float32 or bfloat16 like `hidden`; its gradient is
                  summed in float32, in `weight.main_grad` where there is one
    vocab_size    true size: rows of the (padded) embedding beyond it are not part of the softmax
    temperature   the sampler's, one or one per trained token; log-probs are of softmax(logits / temperature)
    tp_group      ranks holding the shards, in order; None for one shard
    chunk_tokens  tokens projected at a time (`choose_chunk_tokens`)
    sweeps        1: the objective sees a chunk at a time, 6 T H V flops; 2: it sees all tokens at once, 8 T H V
    workspace     the buffer of logits, where the caller keeps it for the next call

    Nothing is read from the device. One backward per forward; in one sweep with a main gradient the upstream gradient
    must be 1; never inside activation recompute (`limits`).
    """
    refuse_too_few_sweeps(objective, sweeps)
    refuse_matrices(hidden, weight)
    refuse_rows(hidden, rows, tp_group, sequence_parallel)
    refuse_fields(fields, rows.total)
    refuse_numbers(weight, rows.total, vocab_size, temperature, tp_group, chunk_tokens)
    refuse_recompute()
    workspace = workspace or Workspace()
    sweep = Sweep(vocab_size, temperature, tp_group, sequence_parallel, chunk_tokens, workspace, entropy_coef)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    function = {1: OneSweep, 2: TwoSweeps}[sweeps]
    return LossOutput(*function.apply(hidden, weight, rows, fields, objective, sweep, differentiate))


@torch.no_grad()
def vocab_parallel_logp(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "shard hidden"],
    rows: TrainedRows,
    labels: Int[Tensor, "trained"],
    *,
    vocab_size: int,
    temperature: Temperature,
    tp_group: Group,
    sequence_parallel: bool,
    chunk_tokens: int,
    workspace: Workspace | None = None,
) -> tuple[Float32[Tensor, "trained"], Float32[Tensor, "trained"]]:
    """Log-prob and entropy of the trained tokens, without gradient: the recompute pass, a reference policy."""
    refuse_matrices(hidden, weight)
    refuse_rows(hidden, rows, tp_group, sequence_parallel)
    refuse_vector("labels", labels, rows.total, integers=True)
    refuse_numbers(weight, rows.total, vocab_size, temperature, tp_group, chunk_tokens)
    workspace = workspace or Workspace()
    sweep = Sweep(vocab_size, temperature, tp_group, sequence_parallel, chunk_tokens, workspace)
    logp, entropy = torch.zeros(2, rows.total, device=hidden.device)
    exchange = sweep.exchange(hidden, rows, differentiate=False)
    for tokens, softmax in sweep.softmaxes(exchange, weight, labels):
        logp[tokens], entropy[tokens] = softmax.logp, softmax.entropy
    return logp, entropy
