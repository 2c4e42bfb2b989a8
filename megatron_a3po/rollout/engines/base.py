"""The protocol of a rollout engine: token ids in, token ids with log-probs and versions out, weights in between.

The engine alone says which version produced a token (never a clock or a counter of the caller). It knows nothing of
text, rewards, groups or staleness. One file per engine beside this one; read `local.py` for the embedded one.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_a3po.rollout.spans import Span
from megatron_a3po.rollout.trajectory import FinishReason


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One response to generate, or a turn of one: the prompt's tokens are then all that came before it. The random
    numbers are a function of (engine seed, prompt_index, sample, turn)."""

    prompt_index: int
    sample: int
    prompt_tokens: npt.NDArray[np.int32]
    max_response_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    turn: int = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """A response: its tokens (an EOS included), their log-probs at the sampling temperature, their versions."""

    tokens: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    finish_reason: FinishReason


class RolloutEngine(Protocol):
    @property
    def version(self) -> int:
        """The version of the weights that the next token will be sampled with."""
        ...

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Generate all of them. They enter the engine in one piece: with nothing else running, the composition of
        its batches is a function of the list alone. Greedy requests are evaluation: see `pinned`."""
        ...

    def pinned(self) -> AbstractAsyncContextManager[int]:
        """While it lasts, greedy requests are answered by one version, which it gives, whatever is published
        meanwhile. One at a time."""
        ...

    async def update_weights(self, version: int, directory: Path) -> int:
        """Serve the weights of a Hugging Face directory. Returns the version in use once these or newer ones are."""
        ...

    async def respond_each(self, request: SampleRequest) -> Mapping[str, Sample]:
        """The same request answered by each server, by its name; nothing where the engine has no servers."""
        ...

    def publication_metrics(self) -> Mapping[str, float]:
        """How the servers took the latest weights, by the names of metrics; nothing where the engine has none."""
        ...

    def take_num_lost(self) -> int:
        """Requests whose tokens were lost with a server since the last call; they are made again by themselves."""
        ...

    def take_num_discarded(self) -> int:
        """Tokens sampled with weights of another attempt since the last call; they are sampled again."""
        ...

    def sampled_between(self, start: float, end: float) -> int:
        """Number of training tokens sampled in an interval of `time.monotonic`."""
        ...

    def spans(self, start: float, end: float) -> list[Span]:
        """What it generated in such an interval, and when it took new weights."""
        ...

    async def failed(self) -> None:
        """Wait until the engine fails, and raise what ended it."""
        ...

    async def close(self) -> None:
        """Stop generating; what is unfinished ends with the reason `abort`."""
        ...
