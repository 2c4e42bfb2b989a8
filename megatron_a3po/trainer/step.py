"""One training step: score what the method needs scored, update mini-batch by mini-batch, gather what was measured.

Everything a rank measured leaves it in one all-gather, after the last update. Before that an update's gradient norm is
all that is read from a device.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.actor.actor import Actor, Update
from megatron_a3po.actor.packing import AlignedSequence, MicroBatch
from megatron_a3po.actor.reference import Reference
from megatron_a3po.algorithm.metric_table import QUANTITIES, report
from megatron_a3po.algorithm.statistics import Statistics
from megatron_a3po.lifetime import kill_point
from megatron_a3po.memory import peak_resident_bytes
from megatron_a3po.trainer.clock import Clock
from megatron_a3po.trainer.method import Method
from megatron_a3po.trainer.shown import Shown

logger = logging.getLogger(__name__)


@dataclass
class Measured:
    """What this rank saw of a step."""

    statistics: Statistics
    loss_sums: list[Tensor] = field(default_factory=list)
    denominators: list[int] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    tokens: int = 0
    tokens_forwarded: int = 0


def train_step(
    actor: Actor,
    mini_batches: list[list[AlignedSequence]],
    method: Method,
    clock: Clock,
    shown: Shown | None = None,
    reference: Reference | None = None,
) -> dict[str, Any]:
    """All updates of one step; returns its metrics, the same on every rank.

    shown: learns of its trajectories.
    reference: the frozen policy of a KL term; it scores every token before the first update, which is a forward more.
    """
    packs = [actor.pack(mini_batch) if mini_batch else [] for mini_batch in mini_batches]
    shown = shown or Shown([])
    measured = Measured(Statistics.empty(QUANTITIES, actor.grid.device))
    forwarded_before = actor.tokens_forwarded
    with clock("proximal_pass"):
        packs = [
            scored(actor, pack, "prox_logp") if pack and method.needs_pass(number) else pack
            for number, pack in enumerate(packs)
        ]
    if reference is not None:
        with clock("reference_pass"), reference.in_place():
            packs = [scored(actor, pack, "reference_logp") if pack else pack for pack in packs]
    for number, pack in enumerate(packs):
        # A mini-batch whose every sequence was masked has nothing to learn from.
        if pack:
            _update(actor, number, pack, method, measured, clock, shown)
            kill_point("mid_update")
    measured.tokens_forwarded = actor.tokens_forwarded - forwarded_before
    measured.tokens = sum(sum(len(s) for s in mb.sequences) for pack in packs for mb in pack)
    with clock("metrics"):
        shown.gather(actor.grid)
        return _gathered(actor, measured) | _of_batch(mini_batches)


def scored(
    actor: Actor, pack: list[MicroBatch], field: Literal["prox_logp", "reference_logp"]
) -> list[MicroBatch]:
    """The same packs with their log-probs under the weights in place as this field (on the last stage only)."""
    found = actor.score(pack)
    if not found:
        return pack
    return [
        replace(micro_batch, fields=replace(micro_batch.fields, **{field: logp}))
        for micro_batch, (logp, _) in zip(pack, found, strict=True)
    ]


def _update(
    actor: Actor,
    number: int,
    pack: list[MicroBatch],
    method: Method,
    measured: Measured,
    clock: Clock,
    shown: Shown,
) -> None:
    objective = method.objective(number)
    update = actor.update(pack, objective, clock, entropy_coef=method.entropy_coef)
    measured.grad_norms.append(update.grad_norm)
    measured.loss_sums.append(update.loss_sum)
    measured.denominators.append(update.denominator)
    # Every tensor rank of the last stage holds the same vectors: one of them speaks.
    if actor.has_loss and actor.grid.tp.is_first:
        with clock("metrics"):
            for micro_batch, output in zip(pack, update.outputs, strict=True):
                for statistics in method.measure(number, objective, output, micro_batch.fields):
                    measured.statistics = measured.statistics.merge(statistics)
                shown.see(objective, output, micro_batch)
    if not update.applied:
        measured.skipped += 1
        _say_what_is_not_finite(actor, number, pack, update)


def _gathered(actor: Actor, measured: Measured) -> dict[str, float]:
    """The step's only collective over metrics: sums, counts, minima and maxima of every rank, merged locally."""
    speaks = actor.has_loss and actor.grid.tp.is_first
    num_updates = len(measured.loss_sums)
    device = actor.grid.device
    losses = torch.stack([loss.double() for loss in measured.loss_sums]) if num_updates else torch.zeros(0)
    counts = torch.tensor(
        [*measured.denominators, measured.tokens_forwarded, measured.tokens], dtype=torch.float64
    )
    spoken = 1.0 if speaks else 0.0
    mask = torch.tensor([spoken] * num_updates + [1.0, 1.0], dtype=torch.float64)
    own = torch.cat(
        [
            measured.statistics.table.flatten(),
            (losses * spoken).to(device),
            (counts * mask).to(device),
            peak_memory(device).to(device),
        ]
    ).contiguous()
    everyone = [torch.empty_like(own) for _ in range(actor.grid.world_size)]
    dist.all_gather(everyone, own)
    gathered = torch.stack(everyone).cpu()

    size = measured.statistics.table.numel()
    tables = gathered[:, :size].unflatten(1, (len(QUANTITIES), 4))
    rest = gathered[:, size:-2].sum(0)
    loss_sums, denominators = rest[:num_updates], rest[num_updates : 2 * num_updates]
    forwarded, tokens = rest[2 * num_updates :].tolist()
    metrics = report(Statistics.merged(QUANTITIES, tables))
    if num_updates:
        metrics["loss"] = (loss_sums / denominators.clamp(min=1)).mean().item()
        metrics["grad_norm"] = float(np.mean(measured.grad_norms))
        metrics["forwards_per_token"] = forwarded / tokens
    metrics["steps_skipped"] = float(measured.skipped)
    largest = dict(zip(("rank", "device"), gathered[:, -2:].amax(0).tolist()))
    return metrics | {f"memory/{of}_bytes": value for of, value in largest.items() if value > 0}


def peak_memory(device: torch.device) -> Tensor:
    """The most bytes this process has had resident, and the most allocated on its GPU since the last call; 0 where
    nobody knows."""
    allocated = 0
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return torch.tensor([peak_resident_bytes() or 0, allocated], dtype=torch.float64)


def _of_batch(mini_batches: list[list[AlignedSequence]]) -> dict[str, Any]:
    """What the host knows of a batch: its trained tokens, their staleness, and how many responses have several."""
    ages = [s.staleness[s.loss_mask] for mini_batch in mini_batches for s in mini_batch]
    stale = np.concatenate([np.zeros(0, np.int32), *ages])
    metrics: dict[str, Any] = {"tokens/trained": float(len(stale))}
    if len(stale):
        values, counts = np.unique(stale, return_counts=True)
        metrics |= {
            "staleness/avg": float(stale.mean()),
            "staleness/max": float(stale.max()),
            "staleness/histogram": {str(age): int(n) for age, n in zip(values, counts, strict=True)},
            "rollout/multi_version_fraction": float(np.mean([len(np.unique(age)) > 1 for age in ages])),
        }
    return metrics


def _say_what_is_not_finite(actor: Actor, number: int, pack: list[MicroBatch], update: Update) -> None:
    """Name the first offending trajectory of a skipped update. Rare, so the device may be read here."""
    found = None
    for micro_batch, output in zip(pack, update.outputs, strict=False):
        index = int(output.first_nonfinite)
        if index >= 0:
            found = micro_batch.trained_token(index)
            break
    everyone: list[tuple[str, int] | None] = [None] * actor.grid.world_size
    dist.all_gather_object(everyone, found, group=actor.grid.host_group)
    where = next((item for item in everyone if item is not None), None)
    culprit = (
        f"first at {where[0]}, token {where[1]}"
        if where
        else "with finite log-probs: the gradient overflowed"
    )
    logger.warning(
        "mini-batch %d: loss or gradient is not finite, %s; this update was not applied", number + 1, culprit
    )
