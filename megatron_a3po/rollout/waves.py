"""Batches of an exact age, bitwise repeatable: `rollout.fixed_staleness`.

Each batch is one wave: when its version is published, all its samples enter the empty engine in one piece, and the
next weights wait until they are done. Which wave is due when is in `fixed_staleness.py`; the asynchronous way to
batches is `continuous.py`.
"""

from collections import deque
from pathlib import Path
from typing import Any

from megatron_a3po.errors import RewardError
from megatron_a3po.rollout.change import Change
from megatron_a3po.rollout.fixed_staleness import FixedStaleness
from megatron_a3po.rollout.prompts import PromptStream
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.trajectory import Group


class WaveProducer:
    """A Producer. Weights are taken in the order of their versions, none is skipped."""

    def __init__(self, sampler: GroupSampler, prompts: PromptStream, schedule: FixedStaleness) -> None:
        self._sampler = sampler
        self._engine = sampler.engine
        self._prompts = prompts
        self._schedule = schedule
        self._published: deque[tuple[int, Path]] = deque()
        self._working = True
        self._change = Change()

    def restore(self, state: dict[str, Any], version: int) -> None:
        for step, groups in state["waiting"].items():
            self._schedule.finish(int(step), groups)  # a kept state has text for keys
        self._schedule.check_resume(version)

    async def run(self) -> None:
        while True:
            for step in self._schedule.due(self._engine.version):
                self._schedule.finish(step, await self._wave(step))
                self._change.tell()
            self._working = False
            self._change.tell()
            while not self._published:
                await self._change.next()
            self._working = True
            await self._engine.update_weights(*self._published[0])
            self._published.popleft()
            self._change.tell()

    async def publish(self, version: int, directory: Path) -> None:
        self._published.append((version, directory))
        self._change.tell()
        while self._engine.version < version:
            await self._change.next()

    async def take(self, version: int) -> list[Group]:
        while (groups := self._schedule.take(version)) is None:
            await self._change.next()
        # How far generation is ahead depends on the clock; a run that repeats must not report it.
        self._sampler.counters.count_only(groups)
        return groups

    async def state(self) -> dict[str, Any]:
        """Waits for the waves of all published weights: those of older ones could not be generated again."""
        while self._working or self._published:
            await self._change.next()
        return {"waiting": dict(self._schedule.waiting)}

    def put_back(self, state: dict[str, Any], groups: list[Group], version: int) -> None:
        state["waiting"][version] = groups

    async def _wave(self, step: int) -> list[Group]:
        prompts = [self._prompts.at(index) for index in self._schedule.prompt_indices(step)]
        groups = [group for group in await self._sampler.sample(prompts) if group is not None]
        if len(groups) < len(prompts):
            raise RewardError(
                f"a reward failed in the batch of step {step}: under rollout.fixed_staleness a batch has a fixed "
                "composition, so no group can be left out; the traceback is in logs/rollout.log."
            )
        return groups
