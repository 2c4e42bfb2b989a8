"""The asynchronous way to batches: groups are admitted as the gate allows, generated at once, and wait in the buffer.

Nothing here holds generation up: a batch is taken from what has finished, and new weights only let more groups in.
The other way, batches of an exact age, is `waves.py`.
"""

import asyncio
from pathlib import Path
from typing import Any

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.buffer import Buffer
from megatron_a3po.rollout.change import Change
from megatron_a3po.rollout.prompts import PromptStream
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.staleness_gate import StalenessGate
from megatron_a3po.rollout.trajectory import Group


class ContinuousProducer:
    """A Producer. Every group that leaves the buffer untrained gives its slot back to the gate."""

    def __init__(
        self,
        sampler: GroupSampler,
        prompts: PromptStream,
        gate: StalenessGate,
        buffer: Buffer,
        *,
        drops_no_signal: bool,
    ) -> None:
        self._sampler = sampler
        self._engine = sampler.engine
        self._counters = sampler.counters
        self._prompts = prompts
        self._gate = gate
        self._buffer = buffer
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
                tasks.create_task(self._produce(prompt_index))
            while True:
                while self._gate.may_admit(self._engine.version):
                    self._gate.admit()
                    self._buffer.admit(self._cursor)
                    tasks.create_task(self._produce(self._cursor))
                    self._cursor += 1
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
        while True:
            self._evict(version)
            if (groups := self._buffer.take(version)) is not None:
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

    async def _produce(self, prompt_index: int) -> None:
        (group,) = await self._sampler.sample([self._prompts.at(prompt_index)])
        if group is None:
            self._discard(prompt_index)
        elif self._drops_no_signal and not group.has_signal:
            self._counters.filtered_groups += 1
            self._discard(prompt_index)
        else:
            self._buffer.finish(group)
        self._change.tell()

    def _discard(self, prompt_index: int) -> None:
        self._buffer.discard(prompt_index)
        self._gate.give_back()

    def _evict(self, version: int) -> None:
        if evicted := self._buffer.evict(version):
            self._counters.dropped_groups += len(evicted)
            self._gate.give_back(len(evicted))
            self._change.tell()
