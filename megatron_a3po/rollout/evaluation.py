"""Greedy accuracy on held-out prompts, on an engine that may be busy training meanwhile.

A checkpoint without a run is evaluated by `trainer/evaluation.py`, with this function.
"""

import asyncio
from collections.abc import Sequence

from megatron_a3po.rollout.engines.base import RolloutEngine
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.sampler import reward_of
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.rollout.workflow import EpisodeSettings, Stage


async def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    stage: Stage,
    prompts: Sequence[Prompt],
    *,
    max_response_tokens: int,
    temperature: float,
) -> Evaluation:
    """Accuracy is the mean reward of one greedy episode per prompt; one that failed counts as 0."""
    settings = EpisodeSettings(max_response_tokens, temperature, greedy=True)
    version = engine.version
    episodes = await stage.run(engine.generate, [(prompt, 0) for prompt in prompts], settings)
    finished = [episode for episode in episodes if episode is not None]
    rewards = await asyncio.gather(*(reward_of(episode, scorer) for episode in finished))
    versions = {version for episode in finished for version in episode.versions}
    return Evaluation(
        accuracy=sum(reward or 0.0 for reward in rewards) / len(prompts),
        num_prompts=len(prompts),
        version=version,
        min_version=min(versions, default=version),
        max_version=max(versions, default=version),
        num_truncated=sum(episode.finish_reason == "length" for episode in finished),
    )
