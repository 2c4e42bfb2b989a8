"""From a prompt to a scored group: episodes by the workflow, rated by it or by the scorer.

Used by both ways of producing batches, `continuous.py` and `waves.py`, and by `evaluation.py` for single responses.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_a3po.lifetime import kill_point
from megatron_a3po.rollout.engines.base import RolloutEngine, Sample, SampleRequest
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.rewards.scorer import Scorer
from megatron_a3po.rollout.spans import Spans, name_of
from megatron_a3po.rollout.statistics import IdleTime, RolloutCounters
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.rollout.workflow import Episode, EpisodeSettings, Stage


@dataclass(frozen=True)
class GroupSampler:
    engine: RolloutEngine
    scorer: Scorer
    stage: Stage
    counters: RolloutCounters
    samples_per_prompt: int
    max_response_tokens: int
    temperature: float
    idle: IdleTime = field(default_factory=IdleTime)
    spans: Spans = field(default_factory=lambda: Spans("rollout process"))

    async def sample(self, prompts: Sequence[Prompt], *, lockstep: bool = False) -> list[Group | None]:
        """One group for each prompt, None where a sample failed. All samples enter the engine in one piece; in lockstep
        their later turns do so too."""
        keys = [(prompt, sample) for prompt in prompts for sample in range(self.samples_per_prompt)]
        settings = EpisodeSettings(self.max_response_tokens, self.temperature)
        with self.spans("generate a group", f"prompt {prompts[0].index}") as details, self.idle.interrupted():
            episodes = await self.stage.run(self._generate, keys, settings, lockstep=lockstep)
            details["tokens of"] = name_of(version for one in episodes if one for version in one.versions)
        with self.spans("score a group", f"prompt {prompts[0].index}"):
            trajectories = await asyncio.gather(*map(self._score, episodes))
        n = self.samples_per_prompt
        return [self._group(prompt, trajectories[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]

    async def _generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """An aborted turn is generated again, from its beginning and with the same random numbers."""
        samples = await self.engine.generate(requests)
        kill_point("generated")
        while aborted := [i for i, sample in enumerate(samples) if sample.finish_reason == "abort"]:
            self.counters.aborted += len(aborted)
            again = await self.engine.generate([requests[i] for i in aborted])
            for i, sample in zip(aborted, again):
                samples[i] = sample
        return samples

    async def _score(self, episode: Episode | None) -> Trajectory | None:
        reward = None if episode is None else await reward_of(episode, self.scorer)
        return None if episode is None or reward is None else episode.trajectory(reward)

    def _group(self, prompt: Prompt, trajectories: Sequence[Trajectory | None]) -> Group | None:
        scored = tuple(trajectory for trajectory in trajectories if trajectory is not None)
        if len(scored) < len(trajectories):
            self.counters.failed_groups += 1
            return None
        group = Group(prompt.index, prompt.text, prompt.answer, scored)
        self.counters.count_scored(group)
        return group


async def reward_of(episode: Episode, scorer: Scorer) -> float | None:
    """The workflow's own, or that of its last turn; None where scoring failed."""
    if episode.reward is not None:
        return float(episode.reward)
    return await scorer.score(episode.prompt.text, episode.turns[-1], episode.prompt.answer)


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
