"""What the trainer and the rollout process say to each other, pickled over one socket pair."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a3po.config import Config


@dataclass(frozen=True)
class Start:
    """The first message: everything the rollout process begins with."""

    config: Config
    run_dir: Path
    attempt: int
    state: dict[str, Any] | None
    first_version: int
    weights_dir: Path
    consumed_steps: int  # batches the run has had


@dataclass(frozen=True)
class Request:
    """A call of one of the service's methods."""

    number: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    number: int
    value: Any


@dataclass(frozen=True)
class Stop:
    """The last message to the rollout process."""


@dataclass(frozen=True)
class Failure:
    """The last message from it: which error ended it, and its text, with the traceback where one helps."""

    error: str
    text: str
