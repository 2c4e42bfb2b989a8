"""An update of a vLLM server is proven, not believed: the log-probs of a response against the trainer's own.

A server calls its weights whatever it was told to. So at the start, after the first publication and then every
`rollout.canary_every` of them each server answers one prompt, and the trainer, whose weights are those that were
published, scores the answers before it goes on. A response of tokens older than the publication is no proof either way.
"""

import logging
from typing import TYPE_CHECKING, cast

from megatron_a3po.errors import RolloutError, ServersGone
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.trainer.probe import compare
from megatron_a3po.trainer.source import result_on_main

if TYPE_CHECKING:
    from megatron_a3po.trainer.loop import Run

logger = logging.getLogger(__name__)

# Mean |trainer - server| over the response: fp32 was measured at 2e-7, one update at some 1e-2; bf16
# has not been measured yet.
TOLERANCE_FP32 = 2e-4
TOLERANCE_BF16 = 5e-2


def prove_update(run: "Run") -> None:
    """RolloutError on every rank where a server samples from other weights than those of `run.progress.step`, if a
    proof is due. Collective, right after publishing."""
    rollout = run.config.rollout
    if rollout.engine != "vllm" or not run.source.publishes:
        return
    if run.num_published > 1 and run.num_published % rollout.canary_period:
        return
    version = run.progress.step
    try:
        answers = result_on_main(run.actor.grid, lambda: cast(RolloutClient, run.client).canary(version))
    except ServersGone:
        return  # the run ends where it needs samples
    tolerance = TOLERANCE_BF16 if run.config.actor.bf16 else TOLERANCE_FP32
    proofs = {
        server: trajectory
        for server, trajectory in sorted(answers.items())
        if (trajectory.versions[trajectory.prompt_length :] == version).all()
    }
    if not proofs and run.actor.grid.is_main:
        logger.warning("the canary of version %d proves nothing: no vLLM server answered with it", version)
    for server, trajectory in proofs.items():
        found = compare(run.actor, trajectory)["sampler_trainer/abs_diff/avg"]
        if not found <= tolerance:
            raise RolloutError(
                f"the vLLM server {server} says that it serves version {version}, but its log-probs are {found:.3g} "
                f"away from the trainer's on average (at most {tolerance:g} is rounding): it did not take the weights "
                "that were published; look at its log, and start it again."
            )
