"""Just-in-time admission against the plain rule, with the real producer and a simulated engine, on a virtual clock."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.rollout.appetite import Appetite
from megatron_a3po.rollout.buffer import Buffer, StalenessPolicy
from megatron_a3po.rollout.continuous import ContinuousProducer
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.prompts import Prompt, PromptStream
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.staleness_gate import StalenessGate
from megatron_a3po.rollout.statistics import RolloutCounters
from megatron_a3po.rollout.workflow import Stage, single_turn
from tests.rollout import virtual_clock
from tests.rollout.tiny import tiny_tokenizer

ETA, GROUPS, SAMPLES, TOKENS = 4, 4, 2, 10
PUBLISHING_S = 0.05


class Plain(Appetite):
    """Whatever the gate lets in starts at once."""

    def delay_s(self, now: float, num_finished: int, num_unfinished: int) -> float:
        return 0.0


@dataclass
class SimulatedEngine:
    """`slots` responses at a time; one takes `seconds(prompt index)`, its tokens spread evenly over that."""

    slots: int
    seconds: Callable[[int], float]
    version: int = 0

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.slots)

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        return list(await asyncio.gather(*map(self._respond, requests)))

    async def _respond(self, request: SampleRequest) -> Sample:
        versions: list[int] = []
        async with self._free:
            for _ in range(TOKENS):
                await asyncio.sleep(self.seconds(request.prompt_index) / TOKENS)
                versions.append(self.version)
        return Sample(
            np.full(TOKENS, 2, np.int32), np.zeros(TOKENS, np.float32), np.array(versions, np.int32), "length"
        )

    async def update_weights(self, version: int, directory: Path) -> int:
        await asyncio.sleep(PUBLISHING_S)
        self.version = max(self.version, version)
        return self.version


@dataclass
class SomeEqual:
    """Rewards of which every `period`-th group's are equal, so that it has no signal."""

    period: int | None
    calls: dict[str, int] = field(default_factory=dict)

    async def score(self, prompt: str, response: str, answer: str) -> float:
        self.calls[prompt] = self.calls.get(prompt, 0) + 1
        return 0.0 if self.period and int(prompt) % self.period == 0 else float(self.calls[prompt])


@dataclass
class World:
    """A trainer of `step_s` a step and an engine, for some steps."""

    step_s: float
    slots: int
    seconds: Callable[[int], float]
    policy: StalenessPolicy = "wait"
    no_signal_every: int | None = None
    num_steps: int = 40

    def run(self, appetite: type[Appetite]) -> "Outcome":
        return virtual_clock.run(self._run(appetite(GROUPS)))

    async def _run(self, appetite: Appetite) -> "Outcome":
        engine, loop = SimulatedEngine(self.slots, self.seconds), asyncio.get_running_loop()
        prompts = [Prompt(i, f"{i}", "", np.array([2], np.int32)) for i in range(1000)]
        scorer = SomeEqual(self.no_signal_every)
        stage = Stage(single_turn, tiny_tokenizer())
        sampler = GroupSampler(engine, scorer, stage, RolloutCounters(), SAMPLES, TOKENS, 1.0)  # type: ignore[arg-type]
        gate, buffer = StalenessGate(ETA, GROUPS), Buffer(self.policy, ETA, GROUPS)
        producer = ContinuousProducer(
            sampler, PromptStream(prompts, 1), gate, buffer, appetite, drops_no_signal=True
        )
        running = asyncio.create_task(producer.run())
        outcome, publishing = Outcome(), []
        for version in range(self.num_steps):
            wanted = loop.time()
            groups = await producer.take(version)
            outcome.idle.append(loop.time() - wanted)
            ages = [version - trajectory.versions[1:] for g in groups for trajectory in g.trajectories]
            outcome.staleness.append(np.concatenate(ages))
            assert gate.admitted <= gate.limit(engine.version)
            await asyncio.sleep(self.step_s)
            publishing.append(asyncio.create_task(producer.publish(version + 1, Path())))
        outcome.seconds = loop.time()
        running.cancel()
        await asyncio.gather(running, *publishing, return_exceptions=True)
        return outcome


@dataclass
class Outcome:
    staleness: list[np.ndarray] = field(default_factory=list)  # of the tokens of each step
    idle: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def mean_staleness(self) -> float:
        return float(np.concatenate(self.staleness).mean())


def always(seconds: float) -> Callable[[int], float]:
    return lambda prompt_index: seconds


def scattered(mean: float) -> Callable[[int], float]:
    """Log-normal durations, each prompt's own."""
    return lambda prompt_index: mean * random.Random(prompt_index).lognormvariate(0.0, 0.3)


def test_a_fast_engine_gives_fresh_samples_and_keeps_no_trainer_waiting() -> None:
    for policy in ("wait", "drop", "train"):
        for seconds in (always(0.4), scattered(0.4)):
            world = World(step_s=1.0, slots=100, seconds=seconds, policy=policy)
            just, plain = world.run(Appetite), world.run(Plain)
            assert just.mean_staleness < 1.2 < 3 < plain.mean_staleness
            # Of more prompts the first to finish are there sooner: all that the plain rule has, at the first step.
            since = 0 if policy == "wait" else 1
            assert sum(just.idle[since:]) <= sum(plain.idle[since:]) + 1e-6
            assert max(just.idle[1:]) < 1e-6


def test_responses_longer_than_a_step_are_begun_as_late_as_they_can_be() -> None:
    """Responses of 2.5 steps are, by the versions of their tokens, 1.5 steps old on the whole at best."""
    world = World(step_s=1.0, slots=100, seconds=always(2.5), num_steps=60)
    just, plain = world.run(Appetite), world.run(Plain)
    assert just.mean_staleness < 1.8 < 2.9 < plain.mean_staleness
    assert max(just.idle[4:]) < PUBLISHING_S
    # It starts knowing nothing, so one wait more at the start is all.
    assert just.seconds <= plain.seconds + 2.5


@pytest.mark.parametrize("policy", ["wait", "drop", "train"])
def test_a_slow_engine_is_never_kept_waiting(policy: StalenessPolicy) -> None:
    """Half of what the trainer could take: generation alone sets the pace, as under the plain rule."""
    for seconds in (always(1.0), scattered(1.0)):
        world = World(step_s=1.0, slots=4, seconds=seconds, policy=policy)
        just, plain = world.run(Appetite), world.run(Plain)
        assert just.seconds <= plain.seconds * 1.005


def test_groups_without_signal_and_uneven_lengths_are_reckoned_with() -> None:
    """Nobody can know the longest response of the next batch: with a capacity that is just enough a wait is left now
    and then, of 2% of the time at most."""
    world = World(step_s=1.0, slots=100, seconds=scattered(1.0), no_signal_every=3, num_steps=60)
    just, plain = world.run(Appetite), world.run(Plain)
    assert just.mean_staleness < plain.mean_staleness - 0.5
    assert sum(just.idle[20:]) <= 0.02 * 40


def test_a_trainer_that_is_away_for_long_is_not_stocked_up_for() -> None:
    """A delay counts from now while the trainer is late; how fast it steps is not forgotten."""
    appetite = Appetite(groups_per_step=2)
    assert appetite.delay_s(0.0, 0, 1) == 0.0
    assert appetite.delay_s(0.0, 0, 2) == np.inf
    for index in (0, 1):
        appetite.admit(index, 0.0)
        appetite.finish(index, 3.0)
    appetite.take([0, 1], 3.0)
    appetite.want(5.0)
    assert (appetite.lead_s, appetite.period_s) == (3.0, 2.0)
    assert appetite.delay_s(5.0, 2, 2) == 1.0  # two batches ahead: wanted in 4, takes 3
    for index in (2, 3):
        appetite.admit(index, 4.0)
        appetite.finish(index, 6.0)
    appetite.take([2, 3], 6.0)
    assert appetite.lead_s == pytest.approx(2.95)
    assert appetite.delay_s(7.0, 2, 0) == pytest.approx(0.05)  # wanted at 8, and the one after it at 10
    assert appetite.delay_s(100.0, 4, 0) == pytest.approx(1.05)
    appetite.want(100.0)
    assert appetite.period_s == pytest.approx(2.0 + 0.05 * 92.0)
