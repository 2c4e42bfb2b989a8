"""The engine over vLLM servers: a response is asked for in segments, each confirmed with the version of every token.

A server says which weights produced which token only when a request ends. So a request is at most
`rollout.segment_tokens` long: what a server that dies had not confirmed is generated again elsewhere, and counted; what
it had confirmed is kept. The random numbers of a segment are a function of (seed, prompt, sample, position), its prefix
cache is its version's own. Evaluation goes to servers that are held at their version.
Servers and updates are in `rollout/vllm/`, which version is served when in `rollout/vllm/fleet.py`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_a3po.config import Config
from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.spans import Span, name_of
from megatron_a3po.rollout.trajectory import FinishReason
from megatron_a3po.rollout.vllm.configured import find_launched_or_given, wanted_of
from megatron_a3po.rollout.vllm.fleet import Fleet
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.rollout.vllm.wire import Foreign, Segment, ServerError, generate_body

REMEMBERED_SEGMENTS = 100_000
ATTEMPTS = 10  # of one request
EVALUATION_SHARE = 4  # so many training requests are under way for one of an evaluation


@dataclass
class Response:
    """What is confirmed of a response. With `one_version` it begins anew where an update reaches it."""

    request: SampleRequest
    one_version: bool
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_lost: int = 0  # requests since the last confirmed segment

    @property
    def num_missing(self) -> int:
        return self.request.max_response_tokens - len(self.tokens)

    def add(self, segment: Segment) -> None:
        self.num_lost = 0
        if self.one_version and len({*self.versions, *segment.versions}) > 1:
            self._begin_anew()
            return
        self.tokens += segment.tokens
        self.logps += segment.logps
        self.versions += segment.versions
        if segment.finish_reason == "stop" or self.num_missing == 0:
            self.finish_reason = segment.finish_reason if segment.finish_reason == "stop" else "length"
        elif segment.finish_reason == "abort" and self.one_version:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self.tokens, self.logps, self.versions = [], [], []

    def sample(self) -> Sample:
        return Sample(
            np.array(self.tokens, np.int32),
            np.array(self.logps, np.float32),
            np.array(self.versions, np.int32),
            self.finish_reason or "abort",
        )


@dataclass
class SharedPrefix:
    """Of requests with the same prompt: where the last one went, and what all of them can come to."""

    cached_at: Server | None = None
    num_tokens: int = 0


class VllmEngine:
    """Create it inside a running event loop."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        eos_token_ids: Sequence[int],
        seed: int,
        max_concurrent_samples: int,
        segment_tokens: int,
        one_version: bool,
    ) -> None:
        self._fleet = fleet
        self._eos_token_ids = tuple(eos_token_ids)
        self._seed = seed
        self._segment_tokens = segment_tokens
        self._one_version = one_version
        # Evaluation has slots of its own, or its many requests at once would keep training waiting.
        self._slots = asyncio.Semaphore(max_concurrent_samples)
        self._greedy_slots = asyncio.Semaphore(max(1, max_concurrent_samples // EVALUATION_SHARE))
        self._closing = False
        self._num_lost = self._num_discarded = 0
        self._segments: deque[Span] = deque(maxlen=REMEMBERED_SEGMENTS)
        self._running = asyncio.create_task(fleet.run(), name="vllm servers")

    @property
    def version(self) -> int:
        return self._fleet.version

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        groups: dict[int, SharedPrefix] = {}
        for request in requests:
            group = groups.setdefault(request.prompt_index, SharedPrefix())
            group.num_tokens += len(request.prompt_tokens) + request.max_response_tokens
        return list(await asyncio.gather(*(self._respond(one, groups[one.prompt_index]) for one in requests)))

    def pinned(self) -> AbstractAsyncContextManager[int]:
        return self._fleet.hold()

    async def update_weights(self, version: int, directory: Path) -> int:
        return await self._fleet.update(version, directory)

    async def respond_each(self, request: SampleRequest) -> Mapping[str, Sample]:
        """The same request answered by every server that serves, by its URL; those that fail on the way left out."""
        await self._fleet.pick()
        servers = list(self._fleet.serving)
        answers = await asyncio.gather(
            *(self._segment(server, Response(request, False)) for server in servers)
        )
        samples: dict[str, Sample] = {}
        for server, segment in zip(servers, answers):
            if segment is not None:
                response = Response(request, False)
                response.add(segment)
                samples[str(server)] = response.sample()
        return samples

    def publication_metrics(self) -> Mapping[str, float]:
        return {} if self._fleet.last_update is None else self._fleet.last_update.metrics()

    def take_num_lost(self) -> int:
        lost, self._num_lost = self._num_lost, 0
        return lost

    def take_num_discarded(self) -> int:
        discarded, self._num_discarded = self._num_discarded, 0
        return discarded

    def sampled_between(self, start: float, end: float) -> int:
        """A segment's tokens count as spread evenly over the time it took."""
        total = 0.0
        for segment in self._segments:
            overlap = min(end, segment.end) - max(start, segment.start)
            if overlap > 0:
                total += segment.details["tokens"] * overlap / max(segment.end - segment.start, 1e-9)
        return round(total)

    def spans(self, start: float, end: float) -> list[Span]:
        return [segment for segment in self._segments if segment.touches(start, end)]

    async def failed(self) -> None:
        await asyncio.shield(self._running)
        raise RolloutError("the tasks that tend the vLLM servers ended.")

    async def close(self) -> None:
        self._closing = True
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._fleet.close()

    async def _respond(self, request: SampleRequest, group: SharedPrefix) -> Sample:
        """Each segment where the one before went, a first one where the group's last went, if there is little between
        the servers: that one has the prefix in its cache."""
        response, near = Response(request, self._one_version), None
        async with self._greedy_slots if request.greedy else self._slots:
            while response.finish_reason is None and not self._closing:
                if request.greedy:
                    server = await self._fleet.pick_held()
                else:
                    server = await self._fleet.pick(near or group.cached_at, group.num_tokens)
                near = group.cached_at = server
                if (segment := await self._segment(server, response)) is not None:
                    response.add(segment)
        return response.sample()

    async def _segment(self, server: Server, response: Response) -> Segment | None:
        """The next segment from this server; None where that failed, and what it had generated is lost.

        Errors: RolloutError for a request that fails wherever it goes.
        """
        request = response.request
        body = generate_body(
            request,
            response.tokens,
            min(self._segment_tokens, response.num_missing),
            seed=self._seed,
            eos_token_ids=self._eos_token_ids,
            cache_salt=server.cache_salt,
        )
        begun = time.monotonic()
        try:
            segment = await server.generate(body)
        except ServerError as error:
            if isinstance(error, Foreign):
                self._num_discarded += error.num_tokens
                await self._fleet.evict(server, error)
            elif not self._closing:
                self._num_lost += 1
                response.num_lost += 1
                if response.num_lost == ATTEMPTS:
                    raise RolloutError(
                        f"{ATTEMPTS} requests in a row for prompt {request.prompt_index} failed; the last of them on "
                        f"the vLLM server {server}: {error}"
                    ) from error
                await self._fleet.failed(server, error)
            return None
        if not request.greedy:
            self._segments.append(_span_of(server, response, segment, begun))
        return segment


def _span_of(server: Server, response: Response, segment: Segment, begun: float) -> Span:
    """`from` is where the segment begins in its trajectory."""
    request = response.request
    details = {
        "prompt": request.prompt_index,
        "sample": request.sample,
        "from": len(request.prompt_tokens) + len(response.tokens),
        "tokens": len(segment.tokens),
    }
    return Span(f"vLLM {server}", "segments", name_of(segment.versions), begun, time.monotonic(), details)


def create_vllm_engine(
    config: Config, run_dir: Path, attempt: int, directory: Path, version: int
) -> VllmEngine:
    """The engine of a configuration; its servers are started and looked for while it already runs."""
    rollout = config.rollout
    wanted = wanted_of(config)
    find_places = find_launched_or_given(config, run_dir, attempt)
    fleet = Fleet(find_places, version, directory, wanted=wanted, timeout_s=rollout.timeout_s)
    return VllmEngine(
        fleet,
        eos_token_ids=wanted.shape.eos_token_ids,
        seed=config.trainer.seed,
        max_concurrent_samples=rollout.max_concurrent_samples,
        segment_tokens=rollout.segment,
        one_version=rollout.update_mode == "restart",
    )
