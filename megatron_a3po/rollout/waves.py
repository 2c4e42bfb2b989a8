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
        self._finished: set[int] = set()  # steps whose waves are done, consumed or not
        self._states: list[
            tuple[set[int], dict[int, list[Group]]]
        ] = []  # being made: missing steps, waiting ones
        self._change = Change()

    def restore(self, state: dict[str, Any], version: int) -> None:
        for step, groups in state["waiting"].items():
            self._finish(int(step), groups)  # a kept state has text for keys
        self._schedule.check_resume(version)

    async def run(self) -> None:
        while True:
            for step in self._schedule.due(self._engine.version):
                self._finish(step, await self._wave(step))
            while not self._published:
                await self._change.next()
            await self._engine.update_weights(*self._published[0])
            self._published.popleft()
            self._change.tell()

    async def publish(self, version: int, directory: Path) -> None:
        if version > self._engine.version:
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
        """What waits now, and the waves of all weights published by now, which could not be generated again later.

        They are waited for, while the trainer goes on and may take them.
        """
        newest = self._published[-1][0] if self._published else self._engine.version
        waiting, versions = dict(self._schedule.waiting), range(self._engine.version, newest + 1)
        missing = {step for version in versions for step in self._schedule.due(version)} - self._finished
        state = missing, waiting
        self._states.append(state)
        while missing:
            await self._change.next()
        self._states = [one for one in self._states if one is not state]
        return {"waiting": waiting}

    def put_back(self, state: dict[str, Any], groups: list[Group], version: int) -> None:
        state["waiting"][version] = groups

    def _finish(self, step: int, groups: list[Group]) -> None:
        self._schedule.finish(step, groups)
        self._finished.add(step)
        for missing, waiting in self._states:
            if step in missing:
                missing.discard(step)
                waiting[step] = groups
        self._change.tell()

    async def _wave(self, step: int) -> list[Group]:
        prompts = [self._prompts.at(index) for index in self._schedule.prompt_indices(step)]
        groups = [group for group in await self._sampler.sample(prompts, lockstep=True) if group is not None]
        if len(groups) < len(prompts):
            raise RewardError(
                f"a reward failed in the batch of step {step}: under rollout.fixed_staleness a batch has a fixed "
                "composition, so no group can be left out; the traceback is in logs/rollout.log."
            )
        return groups
