"""The asynchronous way to batches: groups are admitted just in time, generated at once, and wait in the buffer.

The gate says which groups may start, `appetite.py` how long they can wait: only where generation would not keep up does
it run as far ahead as the gate allows. Nothing here holds a group up that has started. The other way, batches of an
exact age, is `waves.py`.
"""

import asyncio
import contextlib
import math
from pathlib import Path
from typing import Any

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.appetite import Appetite
from megatron_a3po.rollout.buffer import Buffer
from megatron_a3po.rollout.change import Change
from megatron_a3po.rollout.prompts import PromptStream
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.staleness_gate import StalenessGate
from megatron_a3po.rollout.trajectory import Group

PUNCTUAL_S = 0.01  # so much before its time a group may start


class ContinuousProducer:
    """A Producer. Every group that leaves the buffer untrained gives its slot back to the gate."""

    def __init__(
        self,
        sampler: GroupSampler,
        prompts: PromptStream,
        gate: StalenessGate,
        buffer: Buffer,
        appetite: Appetite,
        *,
        drops_no_signal: bool,
    ) -> None:
        self._sampler = sampler
        self._engine = sampler.engine
        self._counters = sampler.counters
        self._prompts = prompts
        self._gate = gate
        self._buffer = buffer
        self._appetite = appetite
        self._drops_no_signal = drops_no_signal
        self._cursor = 0
        self._newest = -1
        self._change = Change()

    def restore(self, state: dict[str, Any], version: int) -> None:
        self._cursor = state["cursor"]
        self._buffer.restore(state["admission_order"], state["finished"])
        self._gate.admitted += len(state["admission_order"])

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for prompt_index in self._buffer.unfinished:  # of a checkpoint: generated again
                self._start(prompt_index, tasks)
            while True:
                delay_s = self._admit(tasks)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._change.next()

    async def publish(self, version: int, directory: Path) -> None:
        self._newest = max(self._newest, version)
        try:
            await self._engine.update_weights(version, directory)
        except (OSError, RolloutError):
            if self._newest == version:
                raise
            return  # removed while it was read, since a newer one is there
        self._evict(self._engine.version)
        self._change.tell()

    async def take(self, version: int) -> list[Group]:
        self._appetite.want(now())
        self._change.tell()
        while True:
            self._evict(version)
            if (groups := self._buffer.take(version)) is not None:
                self._appetite.take((group.prompt_index for group in groups), now())
                self._change.tell()
                return groups
            await self._change.next()

    async def state(self) -> dict[str, Any]:
        return {
            "cursor": self._cursor,
            "admission_order": self._buffer.admission_order,
            "finished": self._buffer.finished,
        }

    def put_back(self, state: dict[str, Any], groups: list[Group], version: int) -> None:
        state["admission_order"] = [group.prompt_index for group in groups] + state["admission_order"]
        state["finished"] = groups + state["finished"]

    def _admit(self, tasks: asyncio.TaskGroup) -> float | None:
        """Start what is due. Returns the seconds until something else may be, None if only an event can tell."""
        version = self._engine.version
        while self._gate.may_admit(version):
            if not self._gate.is_next(version):
                num_finished, num_unfinished = self._buffer.num_finished, self._buffer.num_unfinished
                delay_s = self._appetite.delay_s(now(), num_finished, num_unfinished)
                if delay_s > PUNCTUAL_S:
                    return None if math.isinf(delay_s) else delay_s
            self._gate.admit()
            self._buffer.admit(self._cursor)
            self._start(self._cursor, tasks)
            self._cursor += 1
        return None

    def _start(self, prompt_index: int, tasks: asyncio.TaskGroup) -> None:
        self._appetite.admit(prompt_index, now())
        tasks.create_task(self._produce(prompt_index))

    async def _produce(self, prompt_index: int) -> None:
        (group,) = await self._sampler.sample([self._prompts.at(prompt_index)])
        if group is None:
            self._discard(prompt_index)
        elif self._drops_no_signal and not group.has_signal:
            self._counters.filtered_groups += 1
            self._discard(prompt_index)
        else:
            self._buffer.finish(group)
            self._appetite.finish(prompt_index, now())
        self._change.tell()

    def _discard(self, prompt_index: int) -> None:
        self._buffer.discard(prompt_index)
        self._appetite.discard(prompt_index)
        self._gate.give_back()

    def _evict(self, version: int) -> None:
        if evicted := self._buffer.evict(version):
            self._counters.dropped_groups += len(evicted)
            for group in evicted:
                self._appetite.evict(group.prompt_index)
            self._gate.give_back(len(evicted))
            self._change.tell()


def now() -> float:
    """The event loop's clock."""
    return asyncio.get_running_loop().time()
