"""The supervised warm start: the same actor, the cross-entropy objective, demonstrations from the data file.

Its own optimizer, its own metrics under <run_dir>/warm_start/; it ends as version 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.actor.packing import AlignedSequence
from megatron_a3po.config.warm_start import WarmStartSection
from megatron_a3po.errors import TrainingError
from megatron_a3po.trainer.batch import supervised_sequence
from megatron_a3po.trainer.clock import Clock
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective


def demonstrations(examples: Sequence[Any], tokenizer: Any) -> list[AlignedSequence]:
    """Prompt and response of every example, an EOS after the response where it does not end in one."""
    eos = tokenizer.eos_token_id
    sequences = []
    for number, example in enumerate(examples):
        response = tokenizer.encode(example.response, add_special_tokens=False)
        if eos is not None and response[-1:] != [eos]:
            response.append(eos)
        sequences.append(
            supervised_sequence(f"demonstration {number}", example.tokens, np.array(response, np.int32))
        )
    return sequences


def warm_start(
    actor: Actor,
    section: WarmStartSection,
    sequences: list[AlignedSequence],
    seed: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`section.steps` optimizer steps on shuffled demonstrations; yields (step, metrics) after each."""
    actor.start_stage(Schedule(section.lr, 0.0, section.lr_warmup_iters, "constant", section.steps))
    clock = Clock()
    for step in range(1, section.steps + 1):
        mini_batch = _mini_batch(sequences, seed, step, section.batch_size)
        update = actor.update(actor.pack(mini_batch), supervised_objective, clock)
        loss = _mean_loss(actor, update.loss_sum, update.denominator)
        if not update.applied:
            raise TrainingError(
                f"the warm start's loss or gradient is not finite at step {step}; lower warm_start.lr={section.lr}"
            )
        trained = sum(sequence.denominator for sequence in mini_batch)
        yield step, {"loss": loss, "grad_norm": update.grad_norm, "tokens/trained": trained, **clock.take()}


def _mini_batch(sequences: list[AlignedSequence], seed: int, step: int, size: int) -> list[AlignedSequence]:
    """Batch `step` of an endless stream, shuffled by seed and epoch."""
    epochs, places = np.divmod(np.arange((step - 1) * size, step * size), len(sequences))
    orders = {
        epoch: np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(sequences))
        for epoch in np.unique(epochs).tolist()
    }
    return [
        sequences[orders[epoch][place]] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
    ]


def _mean_loss(actor: Actor, loss_sum: torch.Tensor, denominator: int) -> float:
    """Token mean over every data rank; one rank of each last stage speaks."""
    speaks = actor.has_loss and actor.grid.tp.is_first
    pair = torch.stack(
        [loss_sum.double(), torch.tensor(denominator, dtype=torch.float64, device=loss_sum.device)]
    )
    pair = pair if speaks else torch.zeros_like(pair)
    dist.all_reduce(pair)
    return (pair[0] / pair[1]).item()
