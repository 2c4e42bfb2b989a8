"""The loss's share of a training step's memory: the last pipeline stage with this layer and with dense logits.

    held      weights, main gradients, the optimizer's master weights and moments: there all the time
    peak      what forward and backward of one sequence hold at most beyond that, as torch's allocator counts it

Measured with a sequence of either of two lengths, alone in its micro-batch. Activations grow with the tokens, and so do
dense logits; this layer's buffer stops at one chunk (given that both lengths fill theirs, by `--chunk-tokens`: else the
layer gets less than its due). So the peak is taken to go on as from the shorter to the longer one, and the longest
sequence is where held and peak together fill the memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from loss_heads import dense_logp, over_all_rows
from peak_memory import peak_bytes
from torch import Tensor

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.packing import AlignedSequence, MicroBatch
from megatron_a3po.actor.pipeline import Pipeline
from megatron_a3po.trainer.batch import supervised_sequence
from megatron_a3po.vocab_parallel import LossOutput, Objective


class DensePipeline(Pipeline):
    """Dense logits of all rows, Megatron-Core's cross-entropy and autograd in place of the loss layer."""

    def loss(
        self,
        micro_batch: MicroBatch,
        weight: Tensor,
        hidden: Tensor,
        objective: Objective,
        entropy_coef: float,
    ) -> LossOutput:
        trained = torch.from_numpy(_trained(micro_batch)).to(hidden.device)
        fields = over_all_rows(micro_batch.fields, trained, micro_batch.tokens.shape[1])
        logp = dense_logp(hidden, weight, fields.labels, sequence_parallel=self.settings.sequence_parallel)
        loss = objective(logp, fields).sum()
        kept = logp.detach()[trained]
        return LossOutput(loss, kept, torch.zeros_like(kept), torch.full((), -1, device=hidden.device))


def _trained(micro_batch: MicroBatch) -> np.ndarray:
    """Indices of the trained rows, over all slices of the sequence."""
    masks = [np.zeros(0, np.bool_), *(sequence.loss_mask for sequence in micro_batch.sequences)]
    return np.flatnonzero(np.concatenate(masks))


@dataclass(frozen=True)
class Peaks:
    """Bytes on the last stage's fullest rank; one peak for each length in tokens."""

    held: int
    lengths: tuple[int, int]
    peaks: tuple[int, int]

    def longest(self, memory: float) -> int:
        """Tokens of the longest sequence that fits."""
        (shorter, longer), (low, high) = self.lengths, self.peaks
        return int(longer + (memory - self.held - high) * (longer - shorter) / (high - low))


def measure_peaks(
    actor: Actor, kind: Callable[..., Pipeline], objective: Objective, sequences: Iterable[AlignedSequence]
) -> Peaks:
    """Of a new pipeline for each of two sequences, so that nothing is kept from before. Collective; slow on a CPU."""
    lengths, peaks = [], []
    optimizer = actor.optimizer
    assert optimizer is not None
    held = held_bytes(actor)
    for sequence in sequences:
        packs, pipeline = actor.pack([sequence]), kind(actor.model, actor.grid, actor.pipeline.settings)
        optimizer.zero_grad()
        peaks.append(peak_bytes(lambda: pipeline.train(packs, objective), actor.grid.device))  # noqa: B023
        lengths.append(len(sequence))
    everyone: list[Any] = [None] * actor.grid.world_size
    dist.all_gather_object(everyone, (held, *peaks) if actor.has_loss else None, group=actor.grid.host_group)
    held, low, high = (max(values) for values in zip(*filter(None, everyone), strict=True))
    return Peaks(held, (lengths[0], lengths[1]), (low, high))


def held_bytes(actor: Actor) -> int:
    """What this rank holds between steps."""
    if actor.grid.device.type == "cuda":
        return torch.cuda.memory_allocated()
    optimizer = actor.optimizer
    assert optimizer is not None
    buffers = [buffer for chunk in actor.model for buffer in chunk.buffers]  # pyright: ignore[reportGeneralTypeIssues]
    tensors = [tensor for buffer in buffers for tensor in (buffer.param_data, buffer.grad_data)]
    for inner in (one.optimizer for one in optimizer.distributed_optimizers):
        tensors += [parameter for group in inner.param_groups for parameter in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def lone_sequence(length: int, prompt_share: float, vocab_size: int) -> AlignedSequence:
    """Random tokens, all but the prompt trained on."""
    tokens = np.random.default_rng(length).integers(0, vocab_size, length)
    prompt = max(1, round(prompt_share * length))
    return supervised_sequence(f"{length} tokens", tokens[:prompt], tokens[prompt:])
