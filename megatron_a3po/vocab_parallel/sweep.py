"""One pass over the trained tokens, chunk by chunk, through one workspace of logits.

The temperature divides the rows, [tokens, hidden], before they are projected, and their gradient after: the logits are
never touched for it. Next: `one_sweep` and `two_sweeps`, the passes that make a loss.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group, Pending
from megatron_a3po.vocab_parallel.products import arithmetic_dtype, project_
from megatron_a3po.vocab_parallel.shard_softmax import (
    ShardExponentials,
    Softmax,
    Target,
    VocabShard,
    start_softmax,
)
from megatron_a3po.vocab_parallel.token_fields import Tokens
from megatron_a3po.vocab_parallel.trained_rows import RowExchange, Span, TrainedRows, row_exchange
from megatron_a3po.vocab_parallel.workspace import Workspace

Temperature = float | Float[Tensor, "trained"]


@dataclass(frozen=True)
class Chunk:
    """Some tokens, their rows divided by the temperature, and the shard's logits, valid until the next chunk."""

    tokens: Tokens
    rows: Float[Tensor, "tokens hidden"]
    logits: Float[Tensor, "tokens shard"]
    target: Target
    start_return: Callable[[Float32[Tensor, "tokens hidden"]], None]  # hands in the gradient by `rows`


@dataclass(frozen=True)
class Sweep:
    """How to go through the tokens of a call."""

    vocab_size: int
    temperature: Temperature
    group: Group
    sequence_parallel: bool
    chunk_tokens: int
    workspace: Workspace
    entropy_coef: float = 0.0

    def exchange(self, hidden: Tensor, rows: TrainedRows, *, differentiate: bool) -> RowExchange:
        """Where the rows come from and their gradients go."""
        return row_exchange(
            hidden, rows, self.group, sequence_parallel=self.sequence_parallel, differentiate=differentiate
        )

    def shard(self, weight: Float[Tensor, "shard hidden"]) -> VocabShard:
        """This rank's columns of the true vocabulary."""
        return VocabShard.of(weight, self.vocab_size, self.group)

    def chunks(self, exchange: RowExchange, weight: Tensor, labels: Tensor) -> Iterator[Chunk]:
        """Every chunk, projected."""
        shard, dtype = self.shard(weight), arithmetic_dtype(weight)
        spans = exchange.spans(self.chunk_tokens)
        longest = max((span.size for span in spans), default=0)
        workspace = self.workspace.take(longest, shard.size, dtype, weight.device)
        for span, hidden in _loaded(exchange, spans):
            temperature = self._temperature(span.tokens)
            rows = hidden.to(dtype)
            if temperature is not None:
                rows = (rows / temperature).to(dtype)
            logits = project_(workspace[: span.size], rows, weight[: shard.size])
            target = Target.of(labels[span.tokens], shard)
            yield Chunk(
                span.tokens, rows, logits, target, _returner(exchange, span, temperature, hidden.dtype)
            )

    def start_softmax(self, chunk: Chunk, weight: Tensor) -> tuple[ShardExponentials, Pending]:
        """Exponentials in place of the chunk's logits; the numbers all shards need are on their way.

        Where the logits are in half precision the targets', which decide the loss, are computed in float32.
        """
        exact = None
        if chunk.logits.dtype != torch.float32 and chunk.logits.shape[1]:
            exact = (chunk.rows.float() * weight[chunk.target.column]).sum(1)
        return start_softmax(chunk.logits, chunk.target, self.group, exact)

    def softmaxes(
        self, exchange: RowExchange, weight: Tensor, labels: Tensor
    ) -> Iterator[tuple[Tokens, Softmax]]:
        """Log-probs and entropies, chunk by chunk, and nothing else."""
        for chunk in self.chunks(exchange, weight, labels):
            yield chunk.tokens, Softmax.merged(self.start_softmax(chunk, weight)[1].wait())

    def _temperature(self, tokens: Tokens) -> float | Tensor | None:
        if isinstance(self.temperature, Tensor):
            return self.temperature[tokens, None]
        return None if self.temperature == 1.0 else self.temperature


def _loaded(exchange: RowExchange, spans: Iterable[Span]) -> Iterator[tuple[Span, Tensor]]:
    """Each span with its rows; the next one's are on their way while one is worked on."""
    ahead: tuple[Span, Callable[[], Tensor]] | None = None
    for span in spans:
        loading = exchange.start_load(span)
        if ahead is not None:
            yield ahead[0], ahead[1]()
        ahead = span, loading
    if ahead is not None:
        yield ahead[0], ahead[1]()


def _returner(
    exchange: RowExchange, span: Span, temperature: float | Tensor | None, dtype: torch.dtype
) -> Callable[[Tensor], None]:
    def start_return(gradient: Tensor) -> None:
        if temperature is not None:
            gradient = gradient.div_(temperature)
        exchange.start_return(span, gradient.to(dtype))

    return start_return
