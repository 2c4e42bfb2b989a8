"""The loss layer: from hidden states and a vocabulary shard to loss and gradients, in one sweep.

With a token-level objective the derivative of the loss by a log-prob is known as soon as the log-prob is. So
one pass over chunks of trained tokens does everything, and full logits never exist:

    project -> softmax over shards (one collective) -> objective and its derivative -> logits' gradient in
    place
            -> hidden gradient, weight gradient

The gradients are made in forward; backward hands them out, scaled by the upstream gradient. Where the weight
has a main gradient (Megatron-Core's DDP) its gradient is added there at once, so there the upstream gradient
must be 1: Megatron's per-token-loss path, no loss scaling. `reference` is the same in plain dense torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_a3po.vocab_parallel.collectives import Group
from megatron_a3po.vocab_parallel.products import add_weight_gradient_, hidden_gradient_, project_
from megatron_a3po.vocab_parallel.shard_softmax import ShardSoftmax, VocabShard
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields
from megatron_a3po.vocab_parallel.trained_rows import RowSource, TrainedRows, row_source


@dataclass(frozen=True)
class LossOutput:
    """The summed loss, with gradient, and what it was made of, without; the same on all shards' ranks."""

    loss: Float32[Tensor, ""]
    logp: Float32[Tensor, "trained"]
    entropy: Float32[Tensor, "trained"]
    first_nonfinite: Int64[
        Tensor, ""
    ]  # first trained token with a non-finite log-prob, loss or derivative; -1: none


def vocab_parallel_loss(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "shard hidden"],
    rows: TrainedRows,
    fields: TokenFields,
    objective: Objective,
    *,
    vocab_size: int,
    temperature: float,
    tp_group: Group,
    sequence_parallel: bool,
    chunk_tokens: int,
) -> LossOutput:
    """The sum of the objective over the trained tokens, differentiable in `hidden` and `weight`.

    hidden       last hidden states, replicated over the group; under sequence parallelism this rank's slice
    weight       this rank's rows of the output embedding, float32 or bfloat16 like `hidden`; its gradient is
                 summed in float32, in `weight.main_grad` where there is one
    vocab_size   true size: rows of the (padded) embedding beyond it are not part of the softmax
    temperature  the sampler's; log-probs are of softmax(logits / temperature)
    tp_group     ranks holding the shards, in order; None for one shard

    The objective sees one chunk of tokens at a time. Nothing is read from the device.
    """
    sweep = _Sweep(vocab_size, temperature, tp_group, sequence_parallel, chunk_tokens)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LossOutput(*_OneSweep.apply(hidden, weight, rows, fields, objective, sweep, differentiate))


@torch.no_grad()
def vocab_parallel_logp(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "shard hidden"],
    rows: TrainedRows,
    labels: Int[Tensor, "trained"],
    *,
    vocab_size: int,
    temperature: float,
    tp_group: Group,
    sequence_parallel: bool,
    chunk_tokens: int,
) -> tuple[Float32[Tensor, "trained"], Float32[Tensor, "trained"]]:
    """Log-prob and entropy of the trained tokens, without gradient: the recompute pass, a reference policy."""
    sweep = _Sweep(vocab_size, temperature, tp_group, sequence_parallel, chunk_tokens)
    logp, entropy = _vectors(2, rows.total, hidden)
    source = row_source(hidden, rows, tp_group, sequence_parallel)
    for tokens, _, softmax in sweep.chunks(source, weight, labels):
        logp[tokens], entropy[tokens] = softmax.logp, softmax.entropy
    return logp, entropy


@dataclass(frozen=True)
class _Sweep:
    """One pass over the trained tokens, chunk by chunk, through one workspace of logits."""

    vocab_size: int
    temperature: float
    group: Group
    sequence_parallel: bool
    chunk_tokens: int

    def chunks(
        self, source: RowSource, weight: Tensor, labels: Tensor
    ) -> Iterator[tuple[slice, Tensor, ShardSoftmax]]:
        """(which tokens, their hidden states, their softmax); the softmax is valid until the next chunk."""
        shard = VocabShard.of(weight, self.vocab_size, self.group)
        num_tokens = len(labels)
        workspace = weight.new_empty(min(self.chunk_tokens, num_tokens), shard.size, dtype=torch.float32)
        for start in range(0, num_tokens, self.chunk_tokens):
            tokens = slice(start, min(start + self.chunk_tokens, num_tokens))
            hidden = source.chunk(tokens.start, tokens.stop)
            logits = project_(workspace[: len(hidden)], hidden, weight[: shard.size])
            yield tokens, hidden, ShardSoftmax(logits, labels[tokens], shard, self.temperature, self.group)


class _OneSweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: TrainedRows,
        fields: TokenFields,
        objective: Objective,
        sweep: _Sweep,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        source = row_source(hidden, rows, sweep.group, sweep.sequence_parallel)
        losses, logp, entropy, derivative = _vectors(4, rows.total, hidden)
        want_hidden, want_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        hidden_grad = hidden.new_empty(rows.total, hidden.shape[1]) if want_hidden else None
        weight_grad, in_main_grad = _weight_gradient_buffer(weight) if want_weight else (None, False)

        for tokens, chunk, softmax in sweep.chunks(source, weight, fields.labels):
            logp[tokens], entropy[tokens] = softmax.logp, softmax.entropy
            losses[tokens], derivative[tokens] = _differentiate(
                objective, softmax.logp, fields.slice(tokens.start, tokens.stop)
            )
            if not differentiate:
                continue
            gradient = softmax.logits_gradient_(derivative[tokens])
            num_columns = gradient.shape[1]
            if hidden_grad is not None:
                hidden_gradient_(hidden_grad[tokens], gradient, weight[:num_columns])
            if weight_grad is not None:
                add_weight_gradient_(weight_grad[:num_columns], gradient, chunk)

        ctx.hidden_grad = None if hidden_grad is None else source.reduce(hidden_grad)
        ctx.weight_grad, ctx.in_main_grad = (None if in_main_grad else weight_grad), in_main_grad
        ctx.weight, ctx.local, ctx.hidden_shape, ctx.spent = weight, rows.local, hidden.shape, False
        outputs = losses.sum(), logp, entropy, _first_nonfinite(losses, logp, derivative)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream = upstreams[0]  # the loss's; the other outputs have no gradient
        if ctx.spent:
            raise RuntimeError("the loss layer's gradients were handed out already: one backward per forward")
        ctx.spent = True
        hidden_grad = weight_grad = None
        if ctx.hidden_grad is not None:
            scaled = ctx.hidden_grad.mul_(upstream)
            hidden_grad = scaled.new_zeros(ctx.hidden_shape).index_copy_(0, ctx.local, scaled)
        if ctx.in_main_grad:
            weight_grad = _placeholder(ctx.weight)
        elif ctx.weight_grad is not None:
            weight_grad = ctx.weight_grad.mul_(upstream).to(ctx.weight.dtype)
        ctx.hidden_grad = ctx.weight_grad = ctx.weight = None
        return hidden_grad, weight_grad, None, None, None, None, None


def _vectors(count: int, num_tokens: int, like: Tensor) -> Float32[Tensor, "count trained"]:
    return like.new_zeros(count, num_tokens, dtype=torch.float32)


def _differentiate(objective: Objective, logp: Tensor, fields: TokenFields) -> tuple[Tensor, Tensor]:
    """The objective at each token and its derivative by that token's log-prob: the only autograd there is."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        losses = objective(logp, fields)
        (derivative,) = torch.autograd.grad(losses.sum(), logp)
    return losses.detach(), derivative


def _weight_gradient_buffer(weight: Tensor) -> tuple[Tensor, bool]:
    """Megatron-Core's main gradient where the weight has one (True), else a float32 buffer of our own (False)."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        return main_grad, True
    return torch.zeros_like(weight, dtype=torch.float32), False


def _placeholder(weight: Tensor) -> Tensor:
    """What Megatron-Core's hooks expect of a gradient that is in the main gradient already.

    They assert that there is one, and drop it; but where the weight is tied to an embedding on the same stage
    they add it up with the embedding's own, so there it must be zeros.
    """
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _first_nonfinite(*vectors: Float32[Tensor, "trained"]) -> Int64[Tensor, ""]:
    """Index of the first token with a non-finite value in any vector, -1 for none; stays on the device."""
    finite = torch.stack(vectors).isfinite().all(0)
    num_tokens = finite.shape[0]
    positions = torch.arange(num_tokens, device=finite.device)
    padded = torch.cat([torch.where(finite, num_tokens, positions), positions.new_full((1,), num_tokens)])
    first = padded.amin()
    return torch.where(first == num_tokens, -1, first)
