"""The loss in two sweeps: for objectives that look across tokens, as a sequence-level ratio does.

    forward     first sweep: log-probs and entropies of all tokens; then the objective, once, on all of them
    backward    second sweep: the projection again and, softmax and derivatives being known, both gradients; no
                exchange of numbers

The upstream gradient goes into the derivatives, so here any scalar is right, with a main gradient too. Costs a third
more flops than `one_sweep` and [trained] vectors; the logits of a chunk remain all there ever is of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_a3po.vocab_parallel.gradients import Gradients, WeightTotal
from megatron_a3po.vocab_parallel.limits import SpentOnce
from megatron_a3po.vocab_parallel.logits_gradient import LogitsGradient
from megatron_a3po.vocab_parallel.shard_softmax import Softmax, repeat_softmax
from megatron_a3po.vocab_parallel.sweep import Sweep
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields
from megatron_a3po.vocab_parallel.token_losses import TokenLosses
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows

EVERYTHING = slice(None)


class TwoSweeps(torch.autograd.Function):
    """(hidden, weight, rows, fields, objective, sweep, differentiate) -> loss, logp, entropy, first non-finite."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: TrainedRows,
        fields: TokenFields,
        objective: Objective,
        sweep: Sweep,
        differentiate: bool,
    ) -> tuple[Tensor, ...]:
        softmax = Softmax.empty(rows.total, hidden.device)
        exchange = sweep.exchange(hidden, rows, differentiate=False)
        for tokens, found in sweep.softmaxes(exchange, weight, fields.labels):
            softmax.put_(tokens, found)
        losses = TokenLosses.empty(rows.total, hidden.device)
        derivatives = losses.evaluate_(EVERYTHING, softmax, objective, fields, sweep.entropy_coef)
        if differentiate:
            ctx.save_for_backward(hidden, weight)
            ctx.softmax, ctx.derivatives, ctx.once = softmax, derivatives, SpentOnce()
            ctx.call = rows, fields.labels, sweep
        return losses.outputs(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream = ctx.once.take(upstreams[0])  # the loss's; the other outputs have no gradient
        gradients = _second_sweep(ctx, upstream)
        ctx.softmax = ctx.derivatives = ctx.call = None
        return *gradients, None, None, None, None, None


def _second_sweep(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and weight."""
    hidden, weight = ctx.saved_tensors
    rows, labels, sweep = ctx.call
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    exchange = sweep.exchange(hidden, rows, differentiate=want_hidden)
    total = WeightTotal.of(weight) if want_weight else None
    gradients = Gradients(weight[: sweep.shard(weight).size], total, want_hidden)
    by_logp, by_entropy = ctx.derivatives
    for chunk in sweep.chunks(exchange, weight, labels):
        tokens = chunk.tokens
        softmax = ctx.softmax.take(tokens)
        shard = repeat_softmax(chunk.projection, chunk.target, softmax)
        entropy_term = None if by_entropy is None else by_entropy[tokens] * upstream
        gradient = LogitsGradient.of(shard, softmax, by_logp[tokens] * upstream, entropy_term)
        gradients.add(chunk, shard, gradient)
        del chunk, shard  # the workspace goes before what is handed out comes
    hidden_grad = exchange.finish() if want_hidden else None
    return hidden_grad, None if total is None else total.hand_out(None)
