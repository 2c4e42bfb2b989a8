"""The actor: target policy, optimizer and loss layer on this rank's place in the grid.

It knows mini-batches of aligned sequences and objectives; what a step is, where batches come from and what is published
when, the trainer decides.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from megatron_a3po.actor.experts import count_experts_from, score_biases
from megatron_a3po.actor.grid import Grid
from megatron_a3po.actor.model import TargetPolicy, build_model, unwrap
from megatron_a3po.actor.optimizer import Optimizer, Schedule
from megatron_a3po.actor.packing import AlignedSequence, MicroBatch, micro_batches
from megatron_a3po.actor.pipeline import LossSettings, Pipeline
from megatron_a3po.config import ModelShape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.model import ModelSection
from megatron_a3po.vocab_parallel import LossOutput, Objective, choose_chunk_tokens
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.hugging_face import announce
from megatron_a3po.weights.operations import Layout
from megatron_a3po.weights.shards import full_tensors, load_shards
from megatron_a3po.weights.sources import RandomSource, SafetensorsSource
from megatron_a3po.weights.transports.base import Export

logger = logging.getLogger(__name__)

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Update:
    """What one mini-batch did: per micro-batch outputs (last stage only), and whether its update was applied."""

    outputs: list[LossOutput]
    loss_sum: Tensor
    denominator: int
    grad_norm: float
    applied: bool


class Actor:
    """The target policy in training."""

    def __init__(
        self,
        actor: ActorSection,
        model: ModelSection,
        shape: ModelShape,
        grid: Grid,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        self.config, self.shape, self.grid, self.hf_path = actor, shape, grid, Path(model.hf_path)
        self.model = build_model(actor, shape, grid)
        self.table = table_of(shape)
        self.layout = Layout(shape, actor.padded_vocab_size(shape.vocab_size), grid.tp.rank, grid.tp.size)
        vocab_shard = self.layout.padded_vocab_size // grid.tp.size
        chunk_tokens = actor.loss_chunk_tokens or choose_chunk_tokens(
            shape.hidden_size, vocab_shard, grid.device
        )
        logger.info(
            "loss layer: %d tokens at a time on %d rows of the vocabulary, %.0f MiB of logits",
            chunk_tokens,
            vocab_shard,
            chunk_tokens * vocab_shard * (2 if actor.bf16 and grid.device.type == "cuda" else 4) / 2**20,
        )
        settings = LossSettings(shape.vocab_size, temperature, actor.sequence_parallel, chunk_tokens)
        self.pipeline = Pipeline(self.model, grid, settings)
        self._load(model, seed)
        self.optimizer: Optimizer | None = None
        self._copied: threading.Event | None = None

    def start_stage(self, schedule: Schedule) -> None:
        """Begin a training stage with fresh moments and its own schedule."""
        # At TP > 1 without sequence parallelism every tensor rank routes the same tokens: gradients would be wrong.
        assert self.shape.experts is None, "training a model with experts is refused at the start"
        self.optimizer = Optimizer(self.config, schedule, self.model)

    def pack(self, mini_batch: list[AlignedSequence]) -> list[MicroBatch]:
        """This rank's micro-batches of a mini-batch. The same packs serve scoring and training, so ratios are exact."""
        vp_size = self.config.virtual_pipeline_model_parallel_size
        return micro_batches(
            mini_batch,
            self.grid,
            max_tokens=self.config.max_tokens_per_micro_batch,
            multiple=self.grid.pp.size if vp_size else 1,
            sequence_parallel=self.config.sequence_parallel,
        )

    def update(
        self,
        packs: list[MicroBatch],
        objective: Objective,
        clock: Timed = lambda part: nullcontext(),
        *,
        entropy_coef: float = 0.0,
    ) -> Update:
        """One optimizer step on one mini-batch: forward, backward, and the update on all ranks or on none."""
        assert self.optimizer is not None, "start_stage comes first"
        with clock("forward_backward"):
            self.optimizer.zero_grad()
            outputs = self.pipeline.train(packs, objective, entropy_coef)
            loss_sum = torch.zeros((), device=self.grid.device)
            for output in outputs:
                loss_sum = loss_sum + output.loss
        self._let_go()
        with clock("optimizer"):
            applied, grad_norm = self.optimizer.step(loss_sum)
        return Update(outputs, loss_sum, sum(p.denominator for p in packs), grad_norm, applied)

    def score(self, packs: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """Log-prob and entropy of the trained tokens under the current weights; last stage only."""
        return self.pipeline.score(packs)

    def shards(self) -> list[tuple[str, Tensor]]:
        """(name, this rank's shard) of every weight, up to date; written to, they are the model's. Collective."""
        self._let_go()
        self.gather_parameters()
        return [(name, tensor) for name, tensor, _ in self._parameters()]

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that went through the model's forward on this rank so far, counted where it is called."""
        return sum(unwrap(chunk).tokens_forwarded for chunk in self.model) // len(self.model)

    @property
    def has_loss(self) -> bool:
        """The last pipeline stage computes losses and statistics."""
        return self.grid.pp.is_last

    def write_hugging_face(self, directory: Path, *, with_tokenizer: bool = False) -> None:
        """Write the current weights as a Hugging Face directory. Collective over all ranks."""
        self.export().write(directory, lasting=with_tokenizer)

    def export(self) -> Export:
        """The current weights as full tensors, gathered when they are asked for. Collective over all ranks."""
        self.gather_parameters()
        parameters = [(name, tensor) for name, tensor, own in self._parameters() if own]
        names = [(name, tensor.dtype) for name, tensor in parameters] if self.grid.holds_export else []
        return Export(
            full_tensors(parameters, self.table, self.layout, self.grid.tp.group, self.grid.ep.group),
            announce(names, self.table, ep_size=self.grid.ep.size),
            self.hf_path,
            self.grid.host_group,
            self.grid.pp.group if self.grid.holds_export else None,
        )

    def _load(self, model: ModelSection, seed: int) -> None:
        source = (
            SafetensorsSource(self.hf_path, self.table)
            if model.initialization == "pretrained"
            else RandomSource(self.table, seed)
        )
        load_shards(
            ((name, tensor) for name, tensor, _ in self._parameters()), source, self.table, self.layout
        )

    def _parameters(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, layers and experts numbered over all ranks; this rank's shard; whether it is exported from here)."""
        for chunk in self.model:
            stage = unwrap(chunk)
            for name, parameter in chain(stage.named_parameters(), score_biases(stage)):
                name = self._over_all_ranks(stage, name)
                # The last stage's copy of a tied embedding is loaded like the embedding and exported from the first.
                tied_copy = name == "output_layer.weight" and self.shape.tie_word_embeddings
                yield ("embedding.word_embeddings.weight" if tied_copy else name), parameter, not tied_copy

    def _over_all_ranks(self, stage: TargetPolicy, name: str) -> str:
        """A parameter's name with layers counted over all stages, experts over all expert ranks."""
        if not name.startswith("decoder.layers."):
            return name
        local, rest = name.removeprefix("decoder.layers.").split(".", 1)
        layer = int(stage.decoder.layers[int(local)].layer_number) - 1  # pyright: ignore[reportArgumentType]
        if self.shape.experts is not None:
            num_local = self.shape.experts.num_experts // self.grid.ep.size
            rest = count_experts_from(self.grid.ep.rank * num_local, rest)
        return f"decoder.layers.{layer}.{rest}"

    def hold(self, copied: threading.Event) -> None:
        """Change no weight and no moment before `copied` is set: somebody copies them meanwhile."""
        self._copied = copied

    def _let_go(self) -> None:
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def gather_parameters(self) -> None:
        """Have every weight up to date on every rank. Collective."""
        # Under overlap_param_gather the next forward gathers lazily; whoever reads the weights before that must ask.
        if self.config.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)
