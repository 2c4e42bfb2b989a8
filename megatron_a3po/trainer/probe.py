"""Sampler against trainer where no trained token is fresh enough to tell: one greedy response, scored at once.

Tokens of staleness 0 compare the two for free. A run whose tokens are all older would never notice that the engine
samples from another distribution than the trainer scores; so every `trainer.probe_every` such steps it asks.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from megatron_a3po.actor.packing import AlignedSequence
from megatron_a3po.algorithm.alignment import shift_to_predictions
from megatron_a3po.errors import ServersGone
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.rollout.trajectory import Trajectory
from megatron_a3po.trainer.batch import supervised_sequence
from megatron_a3po.trainer.source import result_on_main

if TYPE_CHECKING:
    from megatron_a3po.trainer.loop import Run


def probe(run: "Run", metrics: dict[str, Any]) -> dict[str, float]:
    """`sampler_trainer/*` of a probe when one is due, else nothing. Collective, right after publishing."""
    if "sampler_trainer/tokens" in metrics or not run.source.publishes:
        run.progress.steps_without_fresh_tokens = 0
        return {}
    run.progress.steps_without_fresh_tokens += 1
    if run.progress.steps_without_fresh_tokens % run.config.trainer.probe_every or run.unpublished:
        return {}
    version = run.progress.step
    try:
        trajectory = result_on_main(run.actor.grid, lambda: cast(RolloutClient, run.client).probe(version))
    except ServersGone:
        return {}  # the run ends where it needs samples
    if not (trajectory.versions[trajectory.prompt_length :] == version).all():
        return {}  # the engine was already asked for newer weights: nothing to compare with
    return compare(run.actor, trajectory)


def compare(actor: Any, trajectory: Trajectory) -> dict[str, float]:
    """|trainer - sampler| log-prob over the response, under the actor's current weights. Collective."""
    prompt, response = np.split(trajectory.tokens, [trajectory.prompt_length])
    sequence: AlignedSequence = supervised_sequence(trajectory.name, prompt, response)
    packs = actor.pack([sequence])
    difference = torch.zeros(3, dtype=torch.float64, device=actor.grid.device)
    for logp, _ in actor.score(packs):
        if len(logp):
            behave = shift_to_predictions(trajectory.behave_logp, 0.0)[sequence.loss_mask]
            found = (logp.double() - torch.from_numpy(behave).to(logp.device)).abs()
            difference = torch.stack([found.mean(), found.max(), found.new_tensor(len(found))])
    torch.distributed.all_reduce(difference, op=torch.distributed.ReduceOp.MAX)
    average, largest, count = difference.tolist()
    return {
        "sampler_trainer/abs_diff/avg": average,
        "sampler_trainer/abs_diff/max": largest,
        "sampler_trainer/tokens": count,
    }
