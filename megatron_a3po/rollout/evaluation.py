"""Greedy accuracy on held-out prompts, on an engine that may be busy training meanwhile.

A checkpoint without a run is evaluated by `trainer/evaluation.py`, with this function.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from megatron_a3po.rollout.engines.base import RolloutEngine, SampleRequest
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.sampler import response_text
from megatron_a3po.rollout.trajectory import Evaluation


async def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_response_tokens: int,
    temperature: float,
) -> Evaluation:
    """Accuracy is the mean reward of one greedy response per prompt; a failed reward call counts as 0."""
    version = engine.version
    samples = await engine.generate(
        [
            SampleRequest(prompt.index, 0, prompt.tokens, max_response_tokens, temperature, greedy=True)
            for prompt in prompts
        ]
    )
    rewards = await asyncio.gather(
        *(
            scorer.score(prompt.text, response_text(tokenizer, sample), prompt.answer)
            for prompt, sample in zip(prompts, samples)
        )
    )
    versions = {int(version) for sample in samples for version in sample.versions}
    return Evaluation(
        accuracy=sum(reward or 0.0 for reward in rewards) / len(prompts),
        num_prompts=len(prompts),
        version=version,
        min_version=min(versions),
        max_version=max(versions),
        num_truncated=sum(sample.finish_reason == "length" for sample in samples),
    )
