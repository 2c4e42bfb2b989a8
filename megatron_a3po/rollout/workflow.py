"""Workflows: what happens between a prompt and its trajectory. A workflow is an async function of one episode.

    async def with_a_calculator(episode: Episode) -> None:
        while call := CALL.search(await episode.generate()):
            episode.give(f"{int(call[1]) + int(call[2])};")

An episode has the prompt and a `generate()`, which has the policy go on and returns the text it added; `give` adds text
of the workflow's own. Everything becomes one trajectory, of which what the policy generated is trained and nothing
else, token by token as the engine sampled it. The plainest workflow is `single_turn`; `rollout.workflow` names another,
and `examples/multi_turn` has one. Episodes are run from `sampler.py` for training and `evaluation.py` for measuring.
"""

import asyncio
import contextlib
import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.trajectory import FinishReason, Trajectory

logger = logging.getLogger(__name__)

Generate = Callable[[Sequence[SampleRequest]], Awaitable[Sequence[Sample]]]
MAX_FAILURES = 8


class Workflow(Protocol):
    """Returns the reward of the episode, or None to have the last turn scored by the `reward` of the configuration."""

    async def __call__(self, episode: "Episode", /) -> float | None: ...


class OutOfTokens(Exception):
    """Nothing fits any more into rollout.max_response_tokens: the episode is over, truncated. Let it pass."""


class Episode:
    """A prompt, and what has been generated and given since. `turns` are the texts of the turns generated."""

    def __init__(
        self, prompt: Prompt, number: int, rounds: "Rounds", tokenizer: Any, settings: "EpisodeSettings"
    ) -> None:
        self.prompt = prompt
        self.number = number
        self.turns: list[str] = []
        self.finish_reason: FinishReason = "stop"
        self.reward: float | None = None
        self._rounds, self._tokenizer, self._settings = rounds, tokenizer, settings
        self._samples: list[Sample] = []  # what was generated and what was given, in order
        self._given: list[tuple[int, int]] = []
        self._length = len(prompt.tokens)

    @property
    def versions(self) -> list[int]:
        """Of the tokens generated."""
        return [int(version) for sample in self._samples for version in sample.versions if version >= 0]

    @property
    def num_left(self) -> int:
        """Tokens that still fit into the response."""
        return len(self.prompt.tokens) + self._settings.max_response_tokens - self._length

    async def generate(self, max_tokens: int | None = None) -> str:
        """The policy's next turn as text, without special tokens. It ends with an end-of-sequence token, after
        `max_tokens`, or when the response is full; `finish_reason` says which."""
        self._refuse_more_than(self.num_left - 1)
        request = SampleRequest(
            self.prompt.index,
            self.number,
            self._tokens(),
            self.num_left if max_tokens is None else min(max_tokens, self.num_left),
            self._settings.temperature,
            self._settings.greedy,
            turn=len(self.turns),
        )
        sample = await self._rounds.ask(self, request)
        self._append(sample)
        self.finish_reason = sample.finish_reason
        self.turns.append(self._tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=True))
        return self.turns[-1]

    def give(self, text: str) -> None:
        """Add text that is not trained; what comes next is generated after it."""
        tokens = np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int32)
        self._refuse_more_than(self.num_left - len(tokens))
        self._given.append((self._length, self._length + len(tokens)))
        self._append(
            Sample(tokens, np.zeros(len(tokens), np.float32), np.full(len(tokens), -1, np.int32), "stop")
        )

    def trajectory(self, reward: float | None) -> Trajectory:
        """All of it, with the versions and log-probs the engine reported."""
        num_prompt = len(self.prompt.tokens)
        return Trajectory(
            prompt_index=self.prompt.index,
            sample=self.number,
            tokens=self._tokens(),
            prompt_length=num_prompt,
            versions=np.concatenate(
                [np.full(num_prompt, -1, np.int32), *(s.versions for s in self._samples)]
            ),
            behave_logp=np.concatenate([np.zeros(num_prompt, np.float32), *(s.logps for s in self._samples)]),
            finish_reason=self.finish_reason,
            reward=reward,
            given=tuple(self._given),
        )

    def _tokens(self) -> np.ndarray:
        return np.concatenate([self.prompt.tokens, *(sample.tokens for sample in self._samples)])

    def _append(self, sample: Sample) -> None:
        self._samples.append(sample)
        self._length += len(sample.tokens)

    def _refuse_more_than(self, left: int) -> None:
        if left < 0:
            self.finish_reason = "length"
            raise OutOfTokens


@dataclass(frozen=True)
class EpisodeSettings:
    max_response_tokens: int
    temperature: float
    greedy: bool = False


async def single_turn(episode: Episode) -> None:
    """One response to the prompt."""
    await episode.generate()


class Rounds:
    """Brings the requests of several episodes to the engine: the first ones of all of them in one piece, the others as
    they come. In lockstep every further round waits for all and goes in one piece too, so that what the engine
    computes together does not depend on the clock."""

    def __init__(self, generate: Generate, num_episodes: int, *, lockstep: bool) -> None:
        self._generate = generate
        self._num_running = num_episodes
        self._lockstep = lockstep
        self._is_first = True
        self.engine_error: Exception | None = None
        self._waiting: list[tuple[Episode, SampleRequest, asyncio.Future[Sample]]] = []

    async def ask(self, episode: Episode, request: SampleRequest) -> Sample:
        if not (self._is_first or self._lockstep):
            return (await self._ask_engine([request]))[0]
        answer: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting.append((episode, request, answer))
        await self._go_if_complete()
        return await answer

    async def leave(self) -> None:
        """An episode is over."""
        self._num_running -= 1
        await self._go_if_complete()

    async def _go_if_complete(self) -> None:
        """Whoever completes a round asks for all."""
        if not self._waiting or len(self._waiting) < self._num_running:
            return
        self._is_first = False
        waiting = sorted(self._waiting, key=lambda one: (one[0].prompt.index, one[0].number))
        self._waiting = []
        try:
            samples = await self._ask_engine([request for _, request, _ in waiting])
        except Exception as error:  # every episode learns of it by its own answer
            for _, _, answer in waiting:
                if not answer.done():
                    answer.set_exception(error)
            return
        except asyncio.CancelledError:
            for _, _, answer in waiting:
                answer.cancel()
            raise
        for (_, _, answer), sample in zip(waiting, samples, strict=True):
            if not answer.done():
                answer.set_result(sample)

    async def _ask_engine(self, requests: Sequence[SampleRequest]) -> Sequence[Sample]:
        try:
            return await self._generate(requests)
        except Exception as error:
            self.engine_error = error
            raise


class Stage:
    """Runs episodes by a workflow; one whose workflow raised is None, and too many of them in a row end the run."""

    def __init__(self, workflow: Workflow, tokenizer: Any) -> None:
        self._workflow = workflow
        self._tokenizer = tokenizer
        self._failures = 0

    async def run(
        self,
        generate: Generate,
        keys: Sequence[tuple[Prompt, int]],
        settings: EpisodeSettings,
        *,
        lockstep: bool = False,
    ) -> list[Episode | None]:
        """One episode for each prompt and number of a sample."""
        rounds = Rounds(generate, len(keys), lockstep=lockstep)
        episodes = [Episode(*key, rounds, self._tokenizer, settings) for key in keys]
        return list(await asyncio.gather(*(self._play(episode, rounds) for episode in episodes)))

    async def _play(self, episode: Episode, rounds: Rounds) -> Episode | None:
        try:
            with contextlib.suppress(OutOfTokens):
                episode.reward = await self._workflow(episode)
            if not episode.turns:
                raise ValueError(f"the workflow generated nothing for prompt {episode.prompt.index}")
        except (Exception, asyncio.CancelledError) as error:
            if rounds.engine_error is not None:
                raise rounds.engine_error from None
            if _is_cancelled():
                raise
            self._fail(error)  # it is the user's own code
            return None
        finally:
            await rounds.leave()
        self._failures = 0
        return episode

    def _fail(self, error: BaseException) -> None:
        self._failures += 1
        logger.warning("the workflow failed (%d in a row)", self._failures, exc_info=error)
        if self._failures >= MAX_FAILURES:
            raise RolloutError(
                f"rollout.workflow failed {self._failures} times in a row, at last with {error!r}; see its traceback"
            ) from error


def _is_cancelled() -> bool:
    """Whether somebody wants this task to end; a CancelledError may also come from within."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def load_workflow(path: str | None) -> Workflow:
    """`module:function` of the configuration, or the plainest one. Whatever importing it raises is the user's."""
    if path is None:
        return single_turn
    module, _, name = path.partition(":")
    workflow = getattr(importlib.import_module(module), name)
    if not inspect.iscoroutinefunction(workflow):
        raise TypeError(f"rollout.workflow={path} is no async function: write `async def {name}(episode)`")
    return cast(Workflow, workflow)
