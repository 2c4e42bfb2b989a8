"""New weights for vLLM servers: those that serve take a published version together, one that comes back takes it alone.

Where the weights come from is in the published directory: they lie there, or the trainer sends them to all workers at
once. How a server takes them is its own matter: it stands still while it receives, or receives them into host memory
first. From files each takes them by itself, and one that takes much longer than another is out. A transfer that broke
is tried again without those that did not answer, then with each alone; who fails then is out. A server that failed
has weights of nobody, so that it must not serve before an update has succeeded.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from megatron_a3po.environment import LOCALHOST
from megatron_a3po.errors import ConfigError
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.rollout.vllm.wire import ServerError, TimedOut, Unreachable
from megatron_a3po.weights.transports.channel import local_address
from megatron_a3po.weights.transports.requests import Offer, Transfer, read_offer

logger = logging.getLogger(__name__)

Failure = ServerError | ConfigError
ANSWER_S = 120.0  # for the trainer to begin a transfer
LATE = 3  # once a server has the weights, another has so many times as long
GRACE_S = 15.0  # for a server to answer once it must have all, or know that its transfer is broken


@dataclass
class Updated:
    """How an update went. `stall_s`: how long generation stood still, on the server where it did so longest."""

    version: int
    num_bytes: int = 0
    duration_s: float = 0.0
    stall_s: float = 0.0
    failed: dict[Server, Failure] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        return {
            "publish/bytes": float(self.num_bytes),
            "publish/duration_s": self.duration_s,
            "publish/gb_per_s": self.num_bytes / max(self.duration_s, 1e-9) / 1e9,
            "publish/stall_s": self.stall_s,
        }


@dataclass(frozen=True)
class Opened:
    """What is about to come: which version, how many bytes, and what each server has to be told."""

    version: int
    num_bytes: int
    told: dict[Server, dict[str, Any]]
    channel_s: float = 0.0  # how long a member waits for another; 0 where there are no members


class Source(Protocol):
    async def open(self, servers: Sequence[Server]) -> Opened: ...

    async def give_up(self) -> None:
        """A server has failed: what is sent to it breaks for all, now rather than after a time."""
        ...

    async def why_broken(self) -> str:
        """Once the sending side has nothing more to do: nothing, or why."""
        ...


class FilesSource:
    def __init__(self, version: int, directory: Path) -> None:
        self._version, self._directory = version, directory.resolve()

    async def open(self, servers: Sequence[Server]) -> Opened:
        num_bytes = sum(file.stat().st_size for file in self._directory.glob("*.safetensors"))
        return Opened(
            self._version, num_bytes, {server: {"directory": str(self._directory)} for server in servers}
        )

    async def give_up(self) -> None:
        pass

    async def why_broken(self) -> str:
        return ""


class CollectiveSource:
    """The trainer's sender. `attempt` gives the servers other names, so that no broken channel is used again."""

    def __init__(self, offer: Offer, attempt: int) -> None:
        self._offer, self._attempt = offer, attempt
        self._transfer: Transfer | None = None

    async def open(self, servers: Sequence[Server]) -> Opened:
        num_workers = [server.num_workers for server in servers]
        members = [f"{server.life} {self._attempt}" for server in servers]
        try:
            addresses = [local_address(urlsplit(server.url).hostname or LOCALHOST, 1) for server in servers]
            address = next((one for one in addresses if one != LOCALHOST), LOCALHOST)
            self._transfer = await asyncio.to_thread(
                Transfer, self._offer, members, sum(num_workers), address, ANSWER_S
            )
            answer = await asyncio.to_thread(self._transfer.answer)
        except (RuntimeError, OSError) as error:
            raise Unreachable(f"the trainer's end of the transfer does not answer: {error}") from error
        return Opened(
            answer["version"],
            sum(bucket["num_bytes"] for bucket in answer["buckets"]),
            {
                server: {**answer, "first_rank": 1 + sum(num_workers[:index])}
                for index, server in enumerate(servers)
            },
            answer["channel"]["timeout_s"],
        )

    async def give_up(self) -> None:
        assert self._transfer is not None
        with suppress(RuntimeError):  # a trainer's end that is gone needs no word
            await asyncio.to_thread(self._transfer.give_up)

    async def why_broken(self) -> str:
        assert self._transfer is not None
        try:
            return await asyncio.to_thread(self._transfer.why_broken)
        except RuntimeError as error:
            return str(error)


async def update_servers(servers: Sequence[Server], version: int, directory: Path) -> Updated:
    """Bring servers to the weights of `directory`, or to newer ones that the trainer has meanwhile."""
    begun = time.monotonic()
    offer = read_offer(directory)
    updated = Updated(version)
    try:
        if offer is None:
            await _take_apart(servers, FilesSource(version, directory), updated)
        else:
            again = await _take(servers, CollectiveSource(offer, 1), updated)
            again = await _take(again, CollectiveSource(offer, 2), updated)
            for server in again:  # one of them breaks it for all
                await _take([server], CollectiveSource(offer, 3), updated)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    done = [server for server in servers if server not in updated.failed]
    updated.version = min((one.version for one in done if one.version is not None), default=version)
    updated.stall_s = max((one.stall_s for one in done), default=0.0)
    updated.duration_s = time.monotonic() - begun
    return updated


async def _take_apart(servers: Sequence[Server], source: Source, updated: Updated) -> None:
    """Each by itself: none stands still for another."""
    begun, deadline = time.monotonic(), math.inf
    async with asyncio.TaskGroup() as tasks:
        taking = {tasks.create_task(_take([server], source, updated)): server for server in servers}
        late = set(taking)
        while late and (now := time.monotonic()) < deadline:
            limit_s = None if math.isinf(deadline) else deadline - now
            done, late = await asyncio.wait(late, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if math.isinf(deadline) and any(taking[task] not in updated.failed for task in done):
                duration_s = time.monotonic() - begun
                deadline = begun + LATE * duration_s + GRACE_S
        for task in late:
            task.cancel()
            updated.failed[taking[task]] = TimedOut("it did not take weights in the time that others need")


async def _take(servers: Sequence[Server], source: Source, updated: Updated) -> list[Server]:
    """One attempt, noted in `updated`. Who is worth another: those that answer, after a transfer that broke. It may
    break between two servers only, after the trainer has sent its last byte."""
    failed = updated.failed
    for server in servers:
        failed.pop(server, None)

    def able() -> list[Server]:
        return [server for server in servers if server not in failed]

    await _each(able(), Server.begin_update, failed)
    if not able():
        return []
    try:
        opened = await source.open(able())
    except ServerError as error:
        failed |= dict.fromkeys(able(), error)
        return []
    updated.num_bytes = opened.num_bytes
    why = await _receive(opened, source, failed)
    is_shared = len(opened.told) > 1
    again = [one for one in opened.told if (why or is_shared) and type(failed.get(one)) is ServerError]
    await _each(able(), lambda server: server.finish_update(opened.version), failed)
    return again


async def _receive(opened: Opened, source: Source, failed: dict[Server, Failure]) -> str:
    """All at once. Why the transfer is broken, or nothing. Once the trainer's end of it is done, whether it broke or
    not, a server that hangs is not waited for."""

    async def receive(server: Server) -> None:
        await _noting(server, server.receive(opened.told[server]), failed)
        if server in failed:
            await source.give_up()

    async with asyncio.TaskGroup() as tasks:
        receiving = {server: tasks.create_task(receive(server)) for server in opened.told}
        if why := await source.why_broken():
            logger.warning("a transfer of weights to %d vLLM servers is broken: %s", len(receiving), why)
        if opened.channel_s:
            _, silent = await asyncio.wait(receiving.values(), timeout=opened.channel_s + GRACE_S)
            for server, task in receiving.items():
                if task in silent:
                    task.cancel()
                    failed[server] = TimedOut(
                        f"it did not answer after a transfer of weights ({why or 'all was sent'})"
                    )
    return why


async def _each(
    servers: Sequence[Server], step: Callable[[Server], Awaitable[None]], failed: dict[Server, Failure]
) -> None:
    await asyncio.gather(*(_noting(server, step(server), failed) for server in servers))


async def _noting(server: Server, work: Awaitable[None], failed: dict[Server, Failure]) -> None:
    try:
        await work
    except (ServerError, ConfigError) as error:
        failed[server] = error
