"""One pass over the trained tokens, chunk by chunk, through one workspace of logits.

Next: `one_sweep` and `two_sweeps`, the passes that make a loss.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megatron_a3po.vocab_parallel.collectives import Group
from megatron_a3po.vocab_parallel.products import arithmetic_dtype
from megatron_a3po.vocab_parallel.projection import Buffers, Projection
from megatron_a3po.vocab_parallel.shard_softmax import Softmax, Target, VocabShard, start_softmax
from megatron_a3po.vocab_parallel.token_fields import Tokens
from megatron_a3po.vocab_parallel.trained_rows import RowExchange, Span, TrainedRows, row_exchange
from megatron_a3po.vocab_parallel.workspace import Workspace

Temperature = float | Float[Tensor, "trained"]


@dataclass(frozen=True)
class Chunk:
    """Some tokens, what makes their logits, and where the gradient by their rows is handed in."""

    tokens: Tokens
    projection: Projection
    target: Target
    start_return: Callable[[Float32[Tensor, "tokens hidden"]], None]


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
        """Every chunk, to be projected."""
        shard, spans = self.shard(weight), exchange.spans(self.chunk_tokens)
        longest = max((span.size for span in spans), default=0)
        buffers = Buffers.of(self.workspace, longest, shard.size, weight)
        for span, hidden in _loaded(exchange, spans):
            rows = hidden.to(arithmetic_dtype(weight))
            projection = Projection(rows, weight[: shard.size], self._scale(span, weight.device), buffers)
            target = Target.of(labels[span.tokens], shard)
            yield Chunk(span.tokens, projection, target, _returner(exchange, span, hidden.dtype))

    def softmaxes(
        self, exchange: RowExchange, weight: Tensor, labels: Tensor
    ) -> Iterator[tuple[Tokens, Softmax]]:
        """Log-probs and entropies, chunk by chunk, and nothing else."""
        for chunk in self.chunks(exchange, weight, labels):
            _, numbers = start_softmax(chunk.projection, chunk.target, self.group)
            yield chunk.tokens, Softmax.merged(numbers.wait())

    def _scale(self, span: Span, device: torch.device) -> Float32[Tensor, "tokens"] | None:
        """1 / temperature of each token; None: 1."""
        if isinstance(self.temperature, Tensor):
            return self.temperature[span.tokens].float().reciprocal()
        if self.temperature == 1.0:
            return None
        return torch.full((span.size,), 1 / self.temperature, device=device)


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


def _returner(exchange: RowExchange, span: Span, dtype: torch.dtype) -> Callable[[Tensor], None]:
    return lambda gradient: exchange.start_return(span, gradient.to(dtype))
