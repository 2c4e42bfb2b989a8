"""All vLLM servers of a run: who gets work, who takes which weights, who is out and comes back.

One task tends each place for as long as it is there: open it, bring the server to the newest weights, let it work
until it fails, and again. Places are looked for again and again; the server of one that is no more gets no new work,
and finishes what it has. A server gets work only between the update and the failure, so whatever serves has weights
that were published. Updates and admissions exclude each other. One that can never serve ends the run, unless another
has served: then it is asked again now and then. Nothing here knows tokens or prompts: that is `engines/vllm.py`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from megatron_a3po.errors import A3POError, ConfigError, RolloutError, ServersGone
from megatron_a3po.rollout.vllm.places import Place
from megatron_a3po.rollout.vllm.server import Server, Wanted
from megatron_a3po.rollout.vllm.updates import Updated, update_servers
from megatron_a3po.rollout.vllm.wire import ServerError, TimedOut, Unreachable

logger = logging.getLogger(__name__)

HEALTH_EVERY_S = 5.0
AGAIN_AFTER_S = 2.0
AGAIN_AFTER_REFUSAL_S = 60.0  # a person must mend it
FAILURES = 3  # in a row are no accident
HELD_SHARE = 4  # one server of so many is held for an evaluation, one at least
CLOSE = 1.25  # a cached prefix is worth so many times the tokens in flight of the idlest server


class Fleet:
    """Create it inside the event loop, then keep `run` running. `version` is the oldest that any server samples with;
    without a server, that of the last one. `find_places` gives all places of the moment, a place that stays as the
    same object."""

    def __init__(
        self,
        find_places: Callable[[], Awaitable[Sequence[Place]]],
        version: int,
        directory: Path,
        *,
        wanted: Wanted,
        timeout_s: float,
    ) -> None:
        self.version = version
        self.serving: list[Server] = []
        self._find_places = find_places
        self._tending: dict[Place, asyncio.Task[None]] = {}
        self._servers: dict[Place, Server] = {}
        self._left: list[Place] = []
        self._any_has_served = False
        self._newest = (version, directory)
        self._wanted = wanted
        self._timeout_s = timeout_s
        self._updating = asyncio.Lock()
        self._held: list[Server] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self.last_update: Updated | None = None
        self._changed = asyncio.Condition()
        self._trouble: dict[Place, str] = {}  # the last of each

    async def run(self) -> None:
        """Until cancelled. Errors: ServersGone once none has been there for the time of `rollout.server_timeout_s`;
        ConfigError, RolloutError for a server that can never serve."""
        try:
            await self._run()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._give_up())
            while True:
                places = await self._find_places()
                for place in places:
                    if place not in self._tending:
                        self._tending[place] = tasks.create_task(self._tend(place))
                await self._close_idle()
                for place in [place for place in self._tending if place not in places]:
                    await self._leave(place)
                await asyncio.sleep(AGAIN_AFTER_S)

    async def close(self) -> None:
        for place in [*self._tending, *self._left]:
            await place.close()

    async def _leave(self, place: Place) -> None:
        logger.info("vLLM server %s is no longer named: it gets no more work", place)
        tending = self._tending.pop(place)
        tending.cancel()
        await asyncio.wait([tending])
        if (server := self._servers.get(place)) in self.serving:
            self.serving.remove(server)
            await self._tell()
        self._left.append(place)

    async def _close_idle(self) -> None:
        """Of the servers that were left, those that have finished what they were asked."""
        for place in list(self._left):
            server = self._servers.get(place)
            if server is None or server.tokens_in_flight == 0:
                self._left.remove(place)
                self._servers.pop(place, None)
                await place.close()

    async def pick(self, near: Server | None = None, num_tokens: int = 0) -> Server:
        """The server with the fewest tokens in flight, as soon as there is one; `near`, which has the prefix of a group
        of `num_tokens` in its cache, where that one is idler by little more than the group."""
        await self._wait(lambda: bool(self._ready()))
        ready = self._ready()
        idlest = min(ready, key=lambda server: server.tokens_in_flight)
        enough = CLOSE * idlest.tokens_in_flight + num_tokens
        return near if near in ready and near.tokens_in_flight <= enough else idlest

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[int]:
        """Keep some servers at their version, which it gives, for `pick_held`: they take new weights when this is over.
        Once they are behind, they get no other work. The longest that weights wait for it is `timeout_s`."""
        await self.pick()
        current = [server for server in self.serving if server.version is not None]
        version = max(server.version or 0 for server in current)
        current = [server for server in current if server.version == version]
        self._held = current[: max(1, len(self.serving) // HELD_SHARE)]
        try:
            yield version
        finally:
            for task in self._waiting:
                task.cancel()
            await self._let_go()

    async def pick_held(self) -> Server:
        """One of those that are held; any other once none of them is left."""
        held = [server for server in self._held if server in self.serving]
        return min(held, key=lambda server: server.tokens_in_flight) if held else await self.pick()

    async def _let_go(self) -> None:
        self._held = []
        async with self._updating:
            behind = [
                one for one in self.serving if one.version is not None and one.version < self._newest[0]
            ]
            if behind:
                await self._take(behind)
        await self._tell()

    async def _let_go_in_time(self) -> None:
        """Where weights wait for too long, the evaluation goes on with whatever is served."""
        held = self._held
        await asyncio.sleep(self._timeout_s)
        if held and self._held is held:
            logger.warning(
                "an evaluation took longer than rollout.server_timeout_s: servers take new weights in it"
            )
            await self._let_go()

    async def failed(self, server: Server, why: ServerError) -> None:
        """A request failed, and will be made again. The server is out where that was no accident: it took too long,
        fails one request after the other, or its health check too."""
        if server not in self.serving:  # of requests that were under way together, one has seen to it
            return
        if (
            isinstance(why, TimedOut) and server.version is None
        ):  # it stands still, for which the update has limits
            return
        trouble: ServerError | A3POError = why
        if not isinstance(why, TimedOut) and server.failures_in_a_row < FAILURES:
            try:
                return await server.check_health()
            except (ServerError, ConfigError) as error:
                trouble = error
        await self.evict(server, trouble)

    async def evict(self, server: Server, why: ServerError | A3POError) -> None:
        """No more work for this one; the task that tends it opens its place again."""
        if server in self.serving:
            self.serving.remove(server)
            logger.warning("vLLM server %s is out: %s", server, why)
            for place, its in self._servers.items():
                if its is server:
                    self._trouble[place] = str(why)
            await self._tell()

    async def update(self, version: int, directory: Path) -> int:
        """Bring all servers to these weights, or newer ones; a server that fails is out. The version then served."""
        if version > self._newest[0]:
            self._newest = (version, directory)
        async with self._updating:
            if self.version < self._newest[0]:
                if servers := [server for server in self.serving if server not in self._held]:
                    await self._take(servers)
                await self._tell()
            if self._held and not self._waiting:
                self._waiting.add(task := asyncio.create_task(self._let_go_in_time()))
                task.add_done_callback(self._waiting.discard)
        await self._wait(lambda: self.version >= version)
        return self.version

    def _ready(self) -> list[Server]:
        """Those that get training work: of the held ones only such as are not behind, unless there is no other."""
        ready = [server for server in self.serving if server.version is not None]
        newest = max((server.version or 0 for server in ready), default=0)
        return [one for one in ready if one not in self._held or one.version == newest]

    async def _take(self, servers: list[Server]) -> None:
        self.last_update = await update_servers(servers, *self._newest)
        for server, error in self.last_update.failed.items():
            server.is_broken = True
            await self.evict(server, error)

    async def _tend(self, place: Place) -> None:
        while True:
            try:
                server = self._servers[place] = await place.open()
                await server.refuse_unsuitable(self._wanted)
                async with self._updating:
                    updated = await update_servers([server], *self._newest)
                    for error in updated.failed.values():
                        server.is_broken = True
                        raise error
                    self.last_update = self.last_update or updated
                    await server.prove_answer()
                    self.serving.append(server)
                    await self._tell()
                self._any_has_served = True
                self._trouble.pop(place, None)
                logger.info("vLLM server %s serves version %d", server, self.version)
                await self._watch(place, server)
            except ConfigError as error:
                if not self._any_has_served:
                    raise
                self._say(place, f"{error} It is left out, and asked again each minute.")
                await asyncio.sleep(AGAIN_AFTER_REFUSAL_S)
            except ServerError as error:
                if not (self._any_has_served or isinstance(error, Unreachable)):
                    raise RolloutError(f"{place} cannot serve the model of model.hf_path: {error}") from error
                self._say(place, str(error))
            await asyncio.sleep(AGAIN_AFTER_S)

    async def _watch(self, place: Place, server: Server) -> None:
        """Returns when the server is out."""
        while server in self.serving:
            try:
                place.check()
                await server.check_health()
            except (ServerError, ConfigError) as error:
                await self.evict(server, error)
            async with self._changed:
                try:
                    gone = self._changed.wait_for(lambda: server not in self.serving)
                    await asyncio.wait_for(gone, HEALTH_EVERY_S)
                except TimeoutError:
                    continue

    async def _give_up(self) -> None:
        last = time.monotonic()
        while time.monotonic() - last < self._timeout_s:
            if self.serving:
                last = time.monotonic()
            await asyncio.sleep(1.0)
        troubles = self._trouble | {place: place.trouble for place in self._tending if place.trouble}
        raise ServersGone(
            f"no vLLM server has been there for {self._timeout_s:g} s (rollout.server_timeout_s): "
            + ("; ".join(f"{place}: {trouble}" for place, trouble in troubles.items()) or "none is named")
        )

    def _say(self, place: Place, trouble: str) -> None:
        """Once, for as long as it is the same."""
        if self._trouble.get(place) != trouble:
            logger.warning("%s: %s", place, trouble)
        self._trouble[place] = trouble

    async def _tell(self) -> None:
        versions = [server.version for server in self._ready() if server.version is not None]
        self.version = max(self.version, min(versions, default=self.version))
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
