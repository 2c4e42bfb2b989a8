"""The embedded engine: a Hugging Face model in this process, sampled by a thread of its own.

Between any two tokens the thread looks for new weights; the newest wins. After an update the caches of all unfinished
prefixes are computed again, so a token's version is exactly that of the weights its logits came from. Evaluation has a
lane of its own, a second copy of the weights that stays as it is until the evaluation is over: its tokens are all of
one version, and training rollouts neither wait for it nor change by a bit because of it. The steps of the two lanes
alternate. Read `decoder.py` for the sampling itself.
"""

import asyncio
import copy
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_a3po.errors import RolloutError
from megatron_a3po.lifetime import kill_point
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.decoder import Decoder, Finished
from megatron_a3po.rollout.engines.weight_files import check_weights, copy_weights, read_weights
from megatron_a3po.rollout.spans import Span, Spans

logger = logging.getLogger(__name__)

REMEMBERED_STEPS = 100_000
NAME = "local engine"
PAUSE_S = 0.005  # steps further apart are two spans of the timeline


@dataclass(frozen=True, slots=True)
class Step:
    """One token for each of `num_tokens` responses."""

    begun: float
    ended: float
    num_tokens: int
    version: int


class LocalEngine:
    """Create it inside a running event loop; its futures belong to that loop."""

    def __init__(
        self,
        weights_dir: Path,
        *,
        version: int,
        eos_token_ids: Sequence[int],
        seed: int,
        max_concurrent_samples: int,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._model = load_model(weights_dir, dtype, device)
        self._decoder_arguments: dict[str, Any] = {
            "eos_token_ids": tuple(eos_token_ids),
            "seed": seed,
            "max_rows": max_concurrent_samples,
        }
        self._training = Decoder(self._model, **self._decoder_arguments)
        self._evaluation: Decoder | None = None
        self._version = self._evaluation_version = version
        # What follows is shared between the event loop and the decode thread, under the condition's lock.
        self._wake = threading.Condition()
        self._inbox: deque[tuple[SampleRequest, asyncio.Future[Sample]]] = deque()
        self._new_weights: tuple[int, dict[str, Tensor]] | None = None
        self._updates: list[tuple[int, asyncio.Future[int]]] = []
        self._pinned: asyncio.Future[int] | None = None
        self._kept_for: asyncio.Future[int] | None = None
        self._closing = False
        self._steps: deque[Step] = deque(maxlen=REMEMBERED_STEPS)
        self._spans = Spans(NAME)
        # Futures belong to the event loop, which fails them all if the thread dies.
        self._outstanding: set[asyncio.Future[Any]] = set()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        return self._version

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self._raise_if_failed()
        entries = [(request, self._promise()) for request in requests]
        with self._wake:
            self._inbox.extend(entries)
            self._wake.notify()
        return list(await asyncio.gather(*(future for _, future in entries)))

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[int]:
        self._raise_if_failed()
        pinned = self._promise()
        with self._wake:
            self._pinned = pinned
            self._wake.notify()
        try:
            yield await pinned
        finally:
            with self._wake:
                self._pinned = None
                self._wake.notify()

    async def update_weights(self, version: int, directory: Path) -> int:
        self._raise_if_failed()
        tensors = await asyncio.to_thread(read_weights, directory)
        kill_point("taking")
        check_weights(self._model, tensors, directory)
        in_use = self._promise()
        with self._wake:
            if self._new_weights is None or self._new_weights[0] < version:
                self._new_weights = (version, tensors)
            self._updates.append((version, in_use))
            self._wake.notify()
        return await in_use

    async def respond_each(self, request: SampleRequest) -> Mapping[str, Sample]:
        return {}

    def publication_metrics(self) -> Mapping[str, float]:
        return {}

    def take_num_lost(self) -> int:
        return 0

    def take_num_discarded(self) -> int:
        return 0

    def sampled_between(self, start: float, end: float) -> int:
        return sum(step.num_tokens for step in self._steps_since(start) if step.ended <= end)

    def spans(self, start: float, end: float) -> list[Span]:
        steps = [step for step in self._steps_since(start) if step.begun < end]
        return [*self._spans.between(start, end), *bursts(reversed(steps))]

    async def failed(self) -> None:
        await asyncio.shield(self._failed)

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _steps_since(self, start: float) -> Iterator[Step]:
        """Those that ended after `start`, the latest first."""
        return itertools.takewhile(lambda step: step.ended >= start, reversed(list(self._steps)))

    def _raise_if_failed(self) -> None:
        if self._failed.done():
            self._failed.result()
        if self._closing:
            raise RolloutError("the local engine is closed.")

    def _promise(self) -> "asyncio.Future[Any]":
        future = self._loop.create_future()
        self._outstanding.add(future)
        future.add_done_callback(self._outstanding.discard)
        return future

    def _fail(self, error: BaseException) -> None:
        """Hand what ended the thread to everybody who waits."""
        for future in (self._failed, *self._outstanding):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: asyncio need not complain about those nobody awaits

    # From here on: the decode thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._take_weights()
                self._take_requests()
                begun = time.monotonic()
                finished = self._training.step(self._version)
                if num_tokens := self._training.num_active + len(finished):
                    self._steps.append(Step(begun, time.monotonic(), num_tokens, self._version))
                self._deliver(finished)
                self._step_evaluation()
            self._deliver(self._training.abort())
            if self._evaluation is not None:
                self._deliver(self._evaluation.abort())
        except (
            BaseException
        ) as error:  # the thread's boundary: whoever waits gets the error with its traceback
            self._loop.call_soon_threadsafe(self._fail, error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._closing or self._inbox or self._updates or self._busy() or self._must_pin()):
                self._wake.wait()
            return not self._closing

    def _busy(self) -> bool:
        if self._evaluation is not None and not (self._evaluation.idle and self._is_kept()):
            return True  # something to sample, or to be forgotten
        return not self._training.idle

    def _must_pin(self) -> bool:
        return self._pinned is not None and self._evaluation is None

    def _is_kept(self) -> bool:
        """Whether the evaluation's copy was made for whoever pins it now."""
        return self._pinned is not None and self._pinned is self._kept_for

    def _take_weights(self) -> None:
        with self._wake:
            weights, self._new_weights = self._new_weights, None
            updates, self._updates = self._updates, []
        if weights is not None and weights[0] > self._version:
            with self._spans("new weights", f"version {weights[0]}"), torch.no_grad():
                copy_weights(self._model, weights[1])
            self._version = weights[0]
            self._training.invalidate()
        for _, in_use in updates:
            self._loop.call_soon_threadsafe(_resolve, in_use, self._version)

    def _take_requests(self) -> None:
        with self._wake:
            entries = list(self._inbox)
            self._inbox.clear()
            pinned = self._pinned if self._must_pin() else None
        if pinned is not None:
            self._begin_evaluation()
            self._kept_for = pinned
            self._loop.call_soon_threadsafe(_resolve, pinned, self._evaluation_version)
        for request, future in entries:
            if request.greedy and self._evaluation is None:
                self._begin_evaluation()
            lane = self._evaluation if request.greedy else self._training
            cast(Decoder, lane).add(request, future)

    def _begin_evaluation(self) -> None:
        """A copy that later updates leave alone; it lives as long as the evaluation."""
        self._evaluation = Decoder(copy.deepcopy(self._model), **self._decoder_arguments)
        self._evaluation_version = self._version

    def _step_evaluation(self) -> None:
        if self._evaluation is None:
            return
        self._deliver(self._evaluation.step(self._evaluation_version))
        if self._evaluation.idle and not self._is_kept():
            self._evaluation = None

    def _deliver(self, finished: list[Finished]) -> None:
        if finished:
            self._loop.call_soon_threadsafe(_resolve_all, finished)


def load_model(directory: Path, dtype: torch.dtype, device: str | None = None) -> Any:
    """The model of a Hugging Face directory, strictly: no weight missing, none left over."""
    # Weights are never unpickled, and code that lies beside them is never run.
    safe = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    options = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, **options, **safe)
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(problem, ()))):
            raise RolloutError(f"{directory}: {problem.replace('_', ' ')} in the checkpoint: {names[:5]}.")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def bursts(steps: Iterable[Step]) -> list[Span]:
    """Steps under one version without a pause between them, as one span."""
    found: list[Span] = []
    for step in steps:
        name = f"version {step.version}"
        begun, num_tokens = step.begun, step.num_tokens
        if found and found[-1].name == name and step.begun - found[-1].end < PAUSE_S:
            last = found.pop()
            begun, num_tokens = last.start, last.details["tokens"] + num_tokens
        found.append(Span(NAME, "decoding", name, begun, step.ended, {"tokens": num_tokens}))
    return found


def _resolve(future: "asyncio.Future[Any]", value: object) -> None:
    if not future.done():
        future.set_result(value)


def _resolve_all(finished: list[Finished]) -> None:
    for item in finished:
        _resolve(cast("asyncio.Future[Sample]", item.ticket), item.sample)
