"""Greedy accuracy on held-out prompts, on an engine that may be busy training meanwhile.

A checkpoint without a run is evaluated by `trainer/evaluation.py`, with this function.
"""

import asyncio
import logging
from collections.abc import Sequence

from megatron_a3po.rollout.engines.base import RolloutEngine
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.sampler import reward_of
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.rollout.workflow import Episode, EpisodeSettings, Stage

logger = logging.getLogger(__name__)


async def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    stage: Stage,
    prompts: Sequence[Prompt],
    *,
    max_response_tokens: int,
    temperature: float,
) -> Evaluation:
    """Accuracy is the mean reward of one greedy episode per prompt; one that failed counts as 0. All are of one
    version: where servers were lost on the way, it is measured once more."""
    settings = EpisodeSettings(max_response_tokens, temperature, greedy=True)

    async def measure() -> tuple[int, list[Episode], set[int]]:
        async with engine.pinned() as version:
            episodes = await stage.run(engine.generate, [(prompt, 0) for prompt in prompts], settings)
        finished = [episode for episode in episodes if episode is not None]
        return version, finished, {version, *(one for episode in finished for one in episode.versions)}

    version, finished, versions = await measure()
    if len(versions) > 1:
        logger.warning("an evaluation met versions %d to %d; it is made again", min(versions), max(versions))
        version, finished, versions = await measure()
    rewards = await asyncio.gather(*(reward_of(episode, scorer) for episode in finished))
    return Evaluation(
        accuracy=sum(reward or 0.0 for reward in rewards) / len(prompts),
        num_prompts=len(prompts),
        version=version,
        min_version=min(versions),
        max_version=max(versions),
        num_truncated=sum(episode.finish_reason == "length" for episode in finished),
    )
