"""Both ways to batches with the real local engine: the straggler of the staleness policies, and exact waves."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.errors import RewardError, RolloutError
from megatron_a3po.rollout.appetite import Appetite
from megatron_a3po.rollout.buffer import Buffer, StalenessPolicy
from megatron_a3po.rollout.continuous import ContinuousProducer
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.local import LocalEngine
from megatron_a3po.rollout.fixed_staleness import FixedStaleness
from megatron_a3po.rollout.prompts import Prompt, PromptStream
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.staleness_gate import StalenessGate
from megatron_a3po.rollout.statistics import RolloutCounters
from megatron_a3po.rollout.trajectory import Group
from megatron_a3po.rollout.waves import WaveProducer
from megatron_a3po.rollout.workflow import Stage, single_turn
from tests.rollout.tiny import EOS_ID, tiny_tokenizer

GROUPS_PER_STEP, SAMPLES = 4, 2
ETA, SHORT = 2, 6
STRAGGLER = 1
PROMPTS = [Prompt(i, f"{i}", f"{i}", np.array([2 + i % 10, 12], np.int32)) for i in range(50)]


@dataclass
class LengthScorer:
    """Stands in for the scorer: the reward is the response's length, or a failure where asked for."""

    fails: set[str] = field(default_factory=set)
    equal: bool = False

    async def score(self, prompt: str, response: str, answer: str) -> float | None:
        return (
            None if prompt in self.fails else 1.0 if self.equal else float(len(response)) + np.random.random()
        )


class StragglingEngine(LocalEngine):
    """One sample is far longer than all the others; what the trainer does in a step takes one of the short ones."""

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        return await super().generate(
            [
                replace(request, max_response_tokens=10 * 5 * ETA * SHORT)
                if (request.prompt_index, request.sample) == (STRAGGLER, 0)
                else request
                for request in requests
            ]
        )


def engine_of(directory: Path, kind=LocalEngine, version: int = 0, eos: Sequence[int] = ()) -> LocalEngine:
    return kind(
        directory, version=version, eos_token_ids=eos, seed=1, max_concurrent_samples=32, device="cpu"
    )


def sampler_of(engine: LocalEngine, scorer: LengthScorer, length: int = SHORT) -> GroupSampler:
    stage = Stage(single_turn, tiny_tokenizer())
    return GroupSampler(engine, scorer, stage, RolloutCounters(), SAMPLES, length, 1.0)  # type: ignore[arg-type]


def continuous(
    sampler: GroupSampler, policy: StalenessPolicy, eta: int = ETA, consumed: int = 0
) -> ContinuousProducer:
    return ContinuousProducer(
        sampler,
        PromptStream(PROMPTS, seed=1),
        StalenessGate(eta, GROUPS_PER_STEP, consumed),
        Buffer(policy, eta, GROUPS_PER_STEP),
        Appetite(GROUPS_PER_STEP),
        drops_no_signal=True,
    )


async def train(producer, versions: list[Path], num_steps: int, first: int = 0) -> list[tuple[int, Group]]:
    """The trainer's side: take a batch, publish the next version."""
    consumed = []
    for version in range(first, first + num_steps):
        consumed += [(version, group) for group in await producer.take(version)]
        await producer.publish(version + 1, versions[(version + 1) % len(versions)])
    return consumed


async def beside(producer, work):
    """Run `work` while the producer runs; an error of either ends both."""
    running = asyncio.create_task(producer.run())
    working = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait({running, working}, return_when=asyncio.FIRST_COMPLETED)
        return await done.pop()
    finally:
        for task in (running, working):
            task.cancel()
        await asyncio.gather(running, working, return_exceptions=True)


def staleness_with_a_straggler(
    versions: list[Path], policy: StalenessPolicy
) -> tuple[dict[int, int], RolloutCounters]:
    """Staleness by prompt index of what was consumed up to the straggler's end."""

    async def run():
        engine = engine_of(versions[0], StragglingEngine)
        sampler = sampler_of(engine, LengthScorer())
        producer = continuous(sampler, policy)
        consumed: list[tuple[int, Group]] = []

        async def until_settled():
            version = 0
            while (
                STRAGGLER not in {group.prompt_index for _, group in consumed}
                and not sampler.counters.dropped_groups
            ):
                consumed.extend(await train(producer, versions, 1, version))
                version += 1
            consumed.extend(await train(producer, versions, 3, version))

        await asyncio.wait_for(beside(producer, until_settled()), 60)
        await engine.close()
        return {
            group.prompt_index: version - group.oldest_version for version, group in consumed
        }, sampler.counters

    return asyncio.run(run())


def test_the_plain_rule_consumes_a_straggler_over_the_bound(versions: list[Path]):
    staleness, _ = staleness_with_a_straggler(versions, "train")
    assert staleness[STRAGGLER] > ETA


def test_wait_consumes_it_within_the_bound(versions: list[Path]):
    staleness, _ = staleness_with_a_straggler(versions, "wait")
    assert max(staleness.values()) <= ETA
    assert list(staleness) == list(range(len(staleness)))


def test_drop_evicts_it_and_stays_within_the_bound(versions: list[Path]):
    staleness, counters = staleness_with_a_straggler(versions, "drop")
    assert STRAGGLER not in staleness
    assert max(staleness.values()) <= ETA
    assert counters.dropped_groups == 1


def test_a_bound_of_zero_is_on_policy(versions: list[Path]):
    async def run():
        engine = engine_of(versions[0])
        producer = continuous(sampler_of(engine, LengthScorer()), "wait", eta=0)
        consumed = await asyncio.wait_for(beside(producer, train(producer, versions, 6)), 60)
        await engine.close()
        return consumed

    for version, group in asyncio.run(run()):
        for trajectory in group.trajectories:
            assert set(trajectory.versions.tolist()) == {-1, version}


def test_filtered_and_failed_groups_give_their_slots_back_and_are_counted(versions: list[Path]):
    async def run():
        engine = engine_of(versions[0])
        sampler = sampler_of(engine, LengthScorer(fails={"3", "4", "5", "17"}))
        producer = continuous(sampler, "wait", eta=1)
        consumed = await asyncio.wait_for(beside(producer, train(producer, versions, 10)), 60)
        assert sampler.counters.failed_groups >= 2
        assert sampler.counters.scored >= len(consumed) * SAMPLES
        sampler.scorer.equal = True  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(beside(producer, train(producer, versions, 3, 10)), 1)
        assert sampler.counters.filtered_groups > 0
        await engine.close()
        return [group.prompt_index for _, group in consumed]

    indices = asyncio.run(run())
    assert indices == sorted(set(indices))
    failing = {i for i in range(max(indices)) if PromptStream(PROMPTS, 1).at(i).text in {"3", "4", "5", "17"}}
    assert set(range(max(indices) + 1)) - set(indices) == failing


def test_a_state_goes_on_with_no_prompt_lost_and_none_twice(versions: list[Path]):
    async def run():
        engine = engine_of(versions[0])
        producer = continuous(sampler_of(engine, LengthScorer()), "wait")
        consumed = await beside(producer, train(producer, versions, 3))
        state = await producer.state()
        await engine.close()
        engine = engine_of(versions[3], version=3)
        producer = continuous(sampler_of(engine, LengthScorer()), "wait", consumed=3 * GROUPS_PER_STEP)
        producer.restore(state, 3)
        consumed += await asyncio.wait_for(beside(producer, train(producer, versions, 4, 3)), 60)
        await engine.close()
        return consumed

    consumed = asyncio.run(run())
    assert [group.prompt_index for _, group in consumed] == list(range(7 * GROUPS_PER_STEP))
    assert max(version - group.oldest_version for version, group in consumed) <= ETA


def waves(versions: list[Path], staleness: int, num_steps: int, pause_s: float, resume_at: int | None = None):
    """Steps of fixed staleness, with a pause before each; optionally in two halves with a state between."""

    async def part(first: int, last: int, state: dict | None):
        engine = engine_of(versions[first % len(versions)], version=first, eos=[EOS_ID])
        sampler = sampler_of(engine, LengthScorer(), length=20)
        producer = WaveProducer(sampler, PromptStream(PROMPTS, 1), FixedStaleness(staleness, GROUPS_PER_STEP))
        if state is not None:
            producer.restore(state, first)

        async def steps():
            consumed = []
            for version in range(first, last):
                await asyncio.sleep(pause_s)
                consumed += [(version, group) for group in await producer.take(version)]
                if version + 1 < last:
                    await producer.publish(version + 1, versions[(version + 1) % len(versions)])
            return consumed, await producer.state()

        result = await asyncio.wait_for(beside(producer, steps()), 60)
        await engine.close()
        return result

    async def run():
        middle = num_steps if resume_at is None else resume_at
        consumed, state = await part(0, middle, None)
        if middle < num_steps:
            consumed += (await part(middle, num_steps, state))[0]
        return consumed

    return asyncio.run(run())


def assert_same(one: list[tuple[int, Group]], other: list[tuple[int, Group]]) -> None:
    assert [version for version, _ in one] == [version for version, _ in other]
    for (_, group), (_, twin) in zip(one, other):
        assert group.prompt_index == twin.prompt_index
        for a, b in zip(group.trajectories, twin.trajectories):
            for name in ("tokens", "versions", "behave_logp"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_fixed_staleness_is_exact_and_bitwise_repeatable(versions: list[Path], staleness: int):
    once = waves(versions, staleness, 6, pause_s=0.0)
    assert_same(once, waves(versions, staleness, 6, pause_s=0.03))
    assert_same(once, waves(versions, staleness, 6, pause_s=0.0, resume_at=3))
    assert [group.prompt_index for _, group in once] == list(range(6 * GROUPS_PER_STEP))
    for version, group in once:
        for trajectory in group.trajectories:
            assert set(trajectory.versions.tolist()) == {-1, max(version - staleness, 0)}


def test_a_resume_without_its_waiting_batches_is_refused():
    with pytest.raises(RolloutError, match=r"version 5 lacks the waiting batches of steps \[5, 6\]"):
        FixedStaleness(2, GROUPS_PER_STEP).check_resume(5)


def test_a_failed_reward_ends_a_run_of_fixed_composition(versions: list[Path]):
    async def run():
        engine = engine_of(versions[0])
        sampler = sampler_of(engine, LengthScorer(fails={str(i) for i in range(50)}))
        producer = WaveProducer(sampler, PromptStream(PROMPTS, 1), FixedStaleness(1, GROUPS_PER_STEP))
        try:
            await beside(producer, producer.take(0))
        finally:
            await engine.close()

    with pytest.raises(RewardError, match="fixed composition"):
        asyncio.run(run())
