"""Episodes on the real local engine: what is generated and what is given, masks, ends, failures, lockstep."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.local import LocalEngine
from megatron_a3po.rollout.engines.random_numbers import sample_uniforms
from megatron_a3po.rollout.fixed_staleness import FixedStaleness
from megatron_a3po.rollout.prompts import Prompt, PromptStream
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.statistics import RolloutCounters
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.rollout.waves import WaveProducer
from megatron_a3po.rollout.workflow import MAX_FAILURES, Episode, Stage, Workflow, load_workflow
from tests.rollout.test_decoder import TOLERANCE, plain_logps
from tests.rollout.test_producers import LengthScorer, beside, engine_of
from tests.rollout.tiny import tiny_model, tiny_tokenizer

TOOL = "=7;"
PROMPT = Prompt(3, "1+2", "3", np.array([3, 12, 4], np.int32))
LENGTH = 24


async def with_a_tool(episode: Episode) -> float:
    """Two turns with a tool between them, the second in two pieces; the reward is the workflow's own."""
    await episode.generate(max_tokens=5)
    episode.give(TOOL)
    await asyncio.sleep(0.001 * (episode.number % 3))  # a tool takes the time it takes
    await episode.generate(max_tokens=6)
    await episode.generate(max_tokens=2)
    return float(episode.number)


async def without_end(episode: Episode) -> None:
    while True:
        await episode.generate(max_tokens=5)
        episode.give(TOOL)


async def talks_first(episode: Episode) -> None:
    episode.give("1" * (LENGTH + 1))


async def fails_for_the_second(episode: Episode) -> float:
    await episode.generate(max_tokens=2)
    return 1.0 / (episode.number - 1)


async def plain(episode: Episode) -> float:
    await episode.generate()
    return 0.5


def sampler_of(engine: LocalEngine, workflow: Workflow, num_samples: int = 3) -> GroupSampler:
    stage = Stage(workflow, tiny_tokenizer())
    return GroupSampler(engine, LengthScorer(), stage, RolloutCounters(), num_samples, LENGTH, 1.0)  # type: ignore[arg-type]


def group_of(versions: list[Path], workflow: Workflow) -> Group | None:
    async def run() -> Group | None:
        engine = engine_of(versions[0])
        (group,) = await sampler_of(engine, workflow).sample([PROMPT])
        await engine.close()
        return group

    return asyncio.run(run())


def test_only_what_the_policy_generated_has_versions_and_log_probs(versions: list[Path]):
    group = group_of(versions, with_a_tool)
    assert group is not None
    given = slice(8, 11)
    for number, one in enumerate(group.trajectories):
        assert one.given == ((8, 11),)
        assert one.generated.tolist() == [False] * 3 + [True] * 5 + [False] * 3 + [True] * 8
        assert one.tokens[given].tolist() == tiny_tokenizer().encode(TOOL, add_special_tokens=False)
        assert (one.versions == np.where(one.generated, 0, -1)).all()
        assert (one.behave_logp[~one.generated] == 0).all()
        assert one.oldest_version == 0
        assert one.reward == number
        # The engine's log-probs are those of a plain forward over the whole conversation.
        whole = SampleRequest(3, number, PROMPT.tokens, LENGTH)
        sample = Sample(one.tokens[3:], one.behave_logp[3:], one.versions[3:], "length")
        expected = np.asarray(plain_logps(tiny_model(0), whole, sample))
        generated = one.generated[3:]
        np.testing.assert_allclose(sample.logps[generated], expected[generated], atol=10 * TOLERANCE, rtol=0)
    first, second = group.trajectories[:2]
    assert first.tokens.tolist() != second.tokens.tolist()


def test_a_single_turn_is_what_the_engine_samples_and_turns_draw_apart(versions: list[Path]):
    async def run() -> list[Sample]:
        engine = engine_of(versions[0])
        requests = [SampleRequest(3, number, PROMPT.tokens, LENGTH) for number in range(3)]
        samples = await engine.generate(requests)
        await engine.close()
        return samples

    group = group_of(versions, plain)
    assert group is not None
    for one, sample in zip(group.trajectories, asyncio.run(run()), strict=True):
        assert one.given == ()
        assert one.tokens[3:].tolist() == sample.tokens.tolist()
        assert one.behave_logp[3:].tolist() == sample.logps.tolist()
    bits = np.random.Philox(key=[1, 3], counter=[0, 0, 0, 2])
    assert (sample_uniforms(1, 3, 2, 9) == np.random.Generator(bits).random(9)).all()
    assert not np.isin(sample_uniforms(1, 3, 2, 9, turn=1), sample_uniforms(1, 3, 2, 100)).any()


def test_an_episode_without_end_is_cut_where_nothing_fits_any_more(versions: list[Path]):
    group = group_of(versions, without_end)
    assert group is not None
    for one in group.trajectories:
        assert one.finish_reason == "length"
        assert len(one.tokens) == 3 + LENGTH
        assert one.given == ((8, 11), (16, 19), (24, 27))


def test_a_workflow_that_fails_loses_its_group_and_in_the_end_the_run(versions: list[Path]):
    assert group_of(versions, fails_for_the_second) is None

    async def run() -> None:
        engine = engine_of(versions[0])
        try:
            await sampler_of(engine, talks_first, MAX_FAILURES).sample([PROMPT])
        finally:
            await engine.close()

    with pytest.raises(
        RolloutError, match=r"failed 8 times in a row, at last with .*generated nothing for prompt 3"
    ):
        asyncio.run(run())


def test_turns_under_fixed_staleness_repeat_bit_for_bit(versions: list[Path]):
    """Tools of different durations: in lockstep they do not change what is computed together."""

    async def run() -> list[Trajectory]:
        engine = engine_of(versions[0])
        prompts = PromptStream([Prompt(i, f"{i}", "", np.array([2 + i, 12], np.int32)) for i in range(9)], 1)
        producer = WaveProducer(sampler_of(engine, with_a_tool), prompts, FixedStaleness(1, 4))
        taken = []

        async def steps() -> None:
            for version in range(3):
                taken.extend(await producer.take(version))
                await producer.publish(version + 1, versions[version + 1])

        await asyncio.wait_for(beside(producer, steps()), 60)
        await engine.close()
        return [one for group in taken for one in group.trajectories]

    once, again = asyncio.run(run()), asyncio.run(run())
    assert len(once) == 3 * 4 * 3
    for one, other in zip(once, again, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.behave_logp.tolist() == other.behave_logp.tolist()
        assert one.given == other.given == ((7, 10),)


def test_a_workflow_is_an_async_function():
    assert load_workflow("tests.rollout.test_workflow:plain") is plain
    with pytest.raises(TypeError, match="is no async function: write `async def sampler_of"):
        load_workflow("tests.rollout.test_workflow:sampler_of")
