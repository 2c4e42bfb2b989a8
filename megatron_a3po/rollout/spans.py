"""What a process was busy with, and when: the material of a run's timeline (`trainer.trace`), one clock for all.

Times are `time.monotonic`, which on Linux is the same clock for every process of a machine. Spans of one track may
overlap; how they are drawn is `trainer/trace.py`'s business.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

REMEMBERED = 20_000


@dataclass(frozen=True)
class Span:
    """Something done from `start` to `end`; `details` are numbers and short texts about it."""

    process: str
    track: str
    name: str
    start: float
    end: float
    details: dict[str, Any] = field(default_factory=dict)

    def touches(self, start: float, end: float) -> bool:
        return self.start < end and self.end > start


class Spans:
    """The latest spans of one process. Written from one thread."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._latest: deque[Span] = deque(maxlen=REMEMBERED)

    @contextmanager
    def __call__(self, track: str, name: str) -> Iterator[dict[str, Any]]:
        """Remember the block, with the details it fills in."""
        start, details = time.monotonic(), dict[str, Any]()
        try:
            yield details
        finally:
            self._latest.append(Span(self._process, track, name, start, time.monotonic(), details))

    def between(self, start: float, end: float) -> list[Span]:
        return [span for span in self._latest if span.touches(start, end)]


def name_of(versions: Iterable[int]) -> str:
    """Of tokens of these versions: `version 3`, `versions 3 to 5`, or `nothing`."""
    found = sorted({int(version) for version in versions})
    if not found:
        return "nothing"
    return f"version {found[0]}" if len(found) == 1 else f"versions {found[0]} to {found[-1]}"
