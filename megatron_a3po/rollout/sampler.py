"""From a prompt to a scored group: the engine generates its samples, the scorer rates them.

Used by both ways of producing batches, `continuous.py` and `waves.py`, and by `evaluation.py` for single responses.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_a3po.lifetime import kill_point
from megatron_a3po.rollout.engines.base import RolloutEngine, Sample, SampleRequest
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.spans import Spans, name_of
from megatron_a3po.rollout.statistics import IdleTime, RolloutCounters
from megatron_a3po.rollout.trajectory import Group, Trajectory


@dataclass(frozen=True)
class GroupSampler:
    engine: RolloutEngine
    scorer: Scorer
    tokenizer: Any
    counters: RolloutCounters
    samples_per_prompt: int
    max_response_tokens: int
    temperature: float
    idle: IdleTime = field(default_factory=IdleTime)
    spans: Spans = field(default_factory=lambda: Spans("rollout process"))

    async def sample(self, prompts: Sequence[Prompt]) -> list[Group | None]:
        """One group for each prompt, None where scoring a sample failed. All samples enter the engine in one piece."""
        keys = [(prompt, sample) for prompt in prompts for sample in range(self.samples_per_prompt)]
        with self.spans("generate a group", f"prompt {prompts[0].index}") as details, self.idle.interrupted():
            samples = await self._generate(keys)
            details["tokens of"] = name_of(version for sample in samples for version in sample.versions)
        with self.spans("score a group", f"prompt {prompts[0].index}"):
            trajectories = await asyncio.gather(
                *(self._score(*key, sample) for key, sample in zip(keys, samples))
            )
        n = self.samples_per_prompt
        return [self._group(prompt, trajectories[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]

    async def _generate(self, keys: Sequence[tuple[Prompt, int]]) -> list[Sample]:
        """An aborted response is generated again, from its beginning and with the same random numbers."""
        requests = [self._request(prompt, sample) for prompt, sample in keys]
        samples = await self.engine.generate(requests)
        kill_point("generated")
        while aborted := [i for i, sample in enumerate(samples) if sample.finish_reason == "abort"]:
            self.counters.aborted += len(aborted)
            again = await self.engine.generate([requests[i] for i in aborted])
            for i, sample in zip(aborted, again):
                samples[i] = sample
        return samples

    def _request(self, prompt: Prompt, sample: int) -> SampleRequest:
        return SampleRequest(prompt.index, sample, prompt.tokens, self.max_response_tokens, self.temperature)

    async def _score(self, prompt: Prompt, number: int, sample: Sample) -> Trajectory | None:
        text = response_text(self.tokenizer, sample)
        if (reward := await self.scorer.score(prompt.text, text, prompt.answer)) is None:
            return None
        return trajectory_of(prompt, number, sample, reward)

    def _group(self, prompt: Prompt, trajectories: Sequence[Trajectory | None]) -> Group | None:
        scored = tuple(trajectory for trajectory in trajectories if trajectory is not None)
        if len(scored) < len(trajectories):
            self.counters.failed_groups += 1
            return None
        group = Group(prompt.index, prompt.text, prompt.answer, scored)
        self.counters.count_scored(group)
        return group


def response_text(tokenizer: Any, sample: Sample) -> str:
    """The response as a reward sees it: without special tokens, so without the EOS."""
    return tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=True)


def trajectory_of(prompt: Prompt, number: int, sample: Sample, reward: float | None) -> Trajectory:
    num_prompt = len(prompt.tokens)
    return Trajectory(
        prompt_index=prompt.index,
        sample=number,
        tokens=np.concatenate([prompt.tokens, sample.tokens]),
        prompt_length=num_prompt,
        versions=np.concatenate([np.full(num_prompt, -1, np.int32), sample.versions]),
        behave_logp=np.concatenate([np.zeros(num_prompt, np.float32), sample.logps]),
        finish_reason=sample.finish_reason,
        reward=reward,
    )
