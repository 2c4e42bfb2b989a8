"""Where a step's time goes: named parts, in seconds of this process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of named parts, and remembers when a part last ran."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.intervals: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self.seconds[part] = self.seconds.get(part, 0.0) + end - start
            self.intervals.setdefault(part, []).append((start, end))

    def take(self) -> dict[str, float]:
        """`time/<part>` and, for all of it, `time/step`, since the last call; the clock starts again from nothing."""
        now = time.monotonic()
        seconds = {**self.seconds, "step": now - self.started}
        self.started, self.seconds, self.intervals = now, {}, {}
        return {f"time/{part}": value for part, value in seconds.items()}
