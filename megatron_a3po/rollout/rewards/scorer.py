"""Scoring off the event loop: each call with a time limit, and an end to the run when calls keep failing.

`exact_number` cannot hang and runs in a thread; every other reward runs in processes of its own (`worker.py`), which
are ended when a call is over its time and started anew. A failed call scores None; `max_failures` of them in a row
raise RewardError with the last one's own traceback.
"""

import asyncio
import logging
import pickle
import sys
import traceback
from typing import Any, Protocol

from megatron_a3po.config.reward import ExactNumberReward, RewardSection
from megatron_a3po.errors import RewardError
from megatron_a3po.rollout.rewards.base import load_reward
from megatron_a3po.rollout.rewards.worker import HEADER, as_float, frame

logger = logging.getLogger(__name__)

NUM_WORKERS = 2
START_TIMEOUT_S = 120.0


class RewardFailed(Exception):
    """One failed call; the text is the function's own traceback."""


class WorkerDied(RewardFailed):
    """The process that made the call ended in it."""


class Runner(Protocol):
    async def start(self) -> None: ...
    async def call(self, prompt: str, response: str, answer: str) -> float: ...
    async def close(self) -> None: ...


class Scorer:
    def __init__(self, section: RewardSection) -> None:
        self._max_failures = section.max_failures
        in_thread = isinstance(section, ExactNumberReward)
        self._runner: Runner = ThreadRunner(section) if in_thread else WorkerRunner(section)
        self._failures = 0

    async def start(self) -> None:
        """RewardError if the function cannot even be loaded."""
        try:
            await self._runner.start()
        except RewardFailed as failure:
            raise RewardError(f"the reward could not be loaded:\n{failure}") from None

    async def score(self, prompt: str, response: str, answer: str) -> float | None:
        """The reward, or None if the call failed."""
        try:
            reward = await self._runner.call(prompt, response, answer)
        except RewardFailed as failure:
            self._failures += 1
            logger.warning("reward call failed (%d in a row):\n%s", self._failures, failure)
            if self._failures >= self._max_failures:
                raise RewardError(
                    f"the reward failed {self._failures} times in a row (reward.max_failures), at last so:\n{failure}"
                ) from None
            return None
        self._failures = 0
        return reward

    async def close(self) -> None:
        await self._runner.close()


class ThreadRunner:
    def __init__(self, section: RewardSection) -> None:
        self._reward = load_reward(section)
        self._timeout_s = section.timeout_s

    async def start(self) -> None:
        pass

    async def call(self, prompt: str, response: str, answer: str) -> float:
        try:
            async with asyncio.timeout(self._timeout_s):
                return as_float(await asyncio.to_thread(self._reward, prompt, response, answer))
        except TimeoutError:
            raise RewardFailed(_over_time(self._timeout_s, response)) from None
        except Exception:
            raise RewardFailed(traceback.format_exc()) from None

    async def close(self) -> None:
        pass


class WorkerRunner:
    """A few worker processes; a call takes a free one and waits its turn for it outside its time limit."""

    def __init__(self, section: RewardSection) -> None:
        self._section = section
        self._free: asyncio.Queue[asyncio.subprocess.Process | None] = asyncio.Queue()
        self._workers: set[asyncio.subprocess.Process] = set()

    async def start(self) -> None:
        self._free.put_nowait(await self._start_worker())
        for _ in range(NUM_WORKERS - 1):
            self._free.put_nowait(None)  # started when needed

    async def call(self, prompt: str, response: str, answer: str) -> float:
        try:
            return await self._call_once(prompt, response, answer)
        except WorkerDied:  # killed from outside, perhaps; a function that ends its process does so again
            return await self._call_once(prompt, response, answer)

    async def _call_once(self, prompt: str, response: str, answer: str) -> float:
        worker = await self._free.get()
        try:
            worker = worker or await self._start_worker()
            ok, value = await self._ask(worker, (prompt, response, answer), self._section.timeout_s)
        except TimeoutError:
            await self._end(worker)
            worker = None
            raise RewardFailed(_over_time(self._section.timeout_s, response)) from None
        except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
            code = await self._end(worker)
            worker = None
            raise WorkerDied(f"the reward function's process ended with exit code {code}") from None
        except asyncio.CancelledError:
            await self._end(worker)  # its answer would be taken for the next call's
            worker = None
            raise
        finally:
            self._free.put_nowait(worker)
        if not ok:
            raise RewardFailed(value)
        return value

    async def close(self) -> None:
        for worker in list(self._workers):
            await self._end(worker)

    async def _start_worker(self) -> asyncio.subprocess.Process:
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "megatron_a3po.rollout.rewards.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._workers.add(worker)
        try:
            ok, text = await self._ask(worker, self._section, START_TIMEOUT_S)
        except TimeoutError:
            ok, text = False, f"loading it took longer than {START_TIMEOUT_S:g} s"
        except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
            ok, text = False, f"its process ended with exit code {await self._end(worker)} while loading it"
        if not ok:
            await self._end(worker)
            raise RewardFailed(text)
        return worker

    async def _ask(
        self, worker: asyncio.subprocess.Process, request: object, timeout_s: float
    ) -> tuple[bool, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        async with asyncio.timeout(timeout_s):
            worker.stdin.write(frame(request))
            await worker.stdin.drain()
            (size,) = HEADER.unpack(await worker.stdout.readexactly(HEADER.size))
            return pickle.loads(await worker.stdout.readexactly(size))

    async def _end(self, worker: asyncio.subprocess.Process | None) -> int | None:
        if worker is None:
            return None
        self._workers.discard(worker)
        if worker.returncode is None:
            worker.kill()
        return await worker.wait()


def _over_time(timeout_s: float, response: str) -> str:
    shown = response if len(response) <= 200 else response[:200] + "..."
    return f"the reward function took longer than reward.timeout_s={timeout_s:g} s for the response {shown!r}"
