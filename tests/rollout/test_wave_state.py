"""A state of fixed staleness is that of the asking, though the trainer takes more before it is answered."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_a3po.rollout.fixed_staleness import FixedStaleness
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.rollout.waves import WaveProducer


class Waves:
    """Generates a wave when it is told to. Stands for sampler and engine, so that the order is the test's."""

    def __init__(self) -> None:
        self.engine, self.version = self, 0
        self.counters = SimpleNamespace(count_only=lambda groups: None)
        self.allowed = asyncio.Semaphore(0)

    async def update_weights(self, version: int, directory: Path) -> None:
        self.version = version

    async def sample(self, prompts: list[int], *, lockstep: bool) -> list[Group]:
        assert lockstep
        await self.allowed.acquire()
        versions = np.array([-1, self.version], np.int32)
        sample = Trajectory(
            prompt_index=prompts[0],
            sample=0,
            prompt_length=1,
            finish_reason="stop",
            reward=1.0,
            tokens=np.array([2, 3], np.int32),
            versions=versions,
            behave_logp=np.zeros(2, np.float32),
        )
        return [Group(prompts[0], "", "", (sample,))]


def test_a_state_has_what_was_there_and_what_could_not_be_generated_again() -> None:
    assert asyncio.run(_state()) == {1: 1, 2: 2, 3: 3}


async def _state() -> dict[int, int]:
    """Step to prompt of the waiting batches in a state that is asked for after step 0 of staleness 2."""
    waves, prompts = Waves(), SimpleNamespace(at=lambda index: index)
    producer = WaveProducer(waves, prompts, FixedStaleness(2, 1))  # pyright: ignore[reportArgumentType]
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(producer.run())
        for _ in range(3):
            waves.allowed.release()
        await producer.take(0)
        await producer.publish(1, Path())
        asked: asyncio.Task[dict[str, Any]] = tasks.create_task(producer.state())
        await asyncio.sleep(0)
        await producer.take(1)
        await producer.take(2)
        second = tasks.create_task(producer.publish(2, Path()))
        assert not asked.done(), "the wave of version 1 is still under way"
        waves.allowed.release()
        state = await asked
        await second
        running.cancel()
    return {step: groups[0].prompt_index for step, groups in state["waiting"].items()}
