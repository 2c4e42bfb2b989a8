"""The loss in one sweep: for objectives that treat each token on its own.

Their derivative by a log-prob is known as soon as the log-prob is, so one pass over the chunks does everything:

    project -> exponentials in place, four numbers on their way to the other shards -> E @ weight meanwhile
            -> log-probs, objective and its derivative -> hidden gradient on its way -> weight gradient meanwhile

The gradients are made in forward; backward hands them out, scaled by the upstream gradient. What is in the main
gradient is not scaled: there the upstream gradient must be 1 (`limits`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_a3po.vocab_parallel.gradients import Gradients, WeightTotal
from megatron_a3po.vocab_parallel.limits import SpentOnce
from megatron_a3po.vocab_parallel.logits_gradient import LogitsGradient
from megatron_a3po.vocab_parallel.shard_softmax import Softmax, start_softmax
from megatron_a3po.vocab_parallel.sweep import Sweep
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields
from megatron_a3po.vocab_parallel.token_losses import TokenLosses
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows


class OneSweep(torch.autograd.Function):
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
        want_hidden, want_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        exchange = sweep.exchange(hidden, rows, differentiate=want_hidden)
        total = WeightTotal.of(weight) if want_weight else None
        gradients = Gradients(weight[: sweep.shard(weight).size], total, want_hidden)
        losses = TokenLosses.empty(rows.total, hidden.device)

        for chunk in sweep.chunks(exchange, weight, fields.labels):
            shard, numbers = start_softmax(chunk.projection, chunk.target, sweep.group)
            # With an entropy term E is rewritten first, and that takes the numbers.
            product = gradients.start_hidden(shard) if sweep.entropy_coef == 0 else None
            softmax = Softmax.merged(numbers.wait())
            derivatives = losses.evaluate_(chunk.tokens, softmax, objective, fields, sweep.entropy_coef)
            if gradients.wanted:
                gradient = LogitsGradient.of(shard, softmax, *derivatives)
                gradients.add(chunk, shard, gradient, product)

        ctx.hidden_grad = exchange.finish() if want_hidden else None
        ctx.total, ctx.once = total, SpentOnce()
        return losses.outputs(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream = ctx.once.take(upstreams[0])  # the loss's; the other outputs have no gradient
        hidden_grad = None if ctx.hidden_grad is None else ctx.hidden_grad.mul_(upstream)
        weight_grad = None if ctx.total is None else ctx.total.hand_out(upstream)
        ctx.hidden_grad = ctx.total = None
        return hidden_grad, weight_grad, None, None, None, None, None
