"""What a person watches: a live display on a terminal, one line a step anywhere else.

Every line goes through logging, so that the log file of rank 0 is the same either way; while the display is live its
lines stay out of the terminal, and everybody else's appear above it. Nothing is computed here but rates over the
last few steps. What is kept for later is in `recording.py`.
"""

import logging
import sys
from collections import deque
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from megatron_a3po.config import Config
from megatron_a3po.trainer.summary import duration

logger = logging.getLogger(__name__)

RECENT_STEPS = 20
REFRESH_PER_S = 1
WARM_START_LINES = 10


class Display:
    """A context; `steps` is the run's last step. On rank 0 only."""

    def __init__(self, config: Config, steps: int, *, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._steps = steps
        self._rates = Rates()
        self._accuracy: float | None = None
        self._console = Console(file=self._file)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._warm_start = self._bars.add_task("warm start", total=None, note="", start=False, visible=False)
        self._training = self._bars.add_task("training", total=steps, note="", start=False)
        self._title = config.run_dir
        self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S)
        self._redirected: list[logging.StreamHandler[Any]] = []

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal that can redraw lines."""
        return self._file.isatty() and not self._console.is_dumb_terminal

    def __enter__(self) -> Self:
        if self.is_live:
            self._live.start()
            self._live.update(self._bars)
            self._redirect_logs()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()
            self._restore_logs()

    def plan(self, lines: list[str]) -> None:
        """What will happen."""
        self._tell("\n".join(lines), boxed=True)

    def say(self, text: str) -> None:
        """Anything worth a line."""
        self._tell(text)

    def warm_start(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """A supervised step; every tenth of them has a line."""
        if step % max(1, steps // WARM_START_LINES) == 0 or step == steps:
            logger.info("warm start %d/%d  %s", step, steps, "  ".join(_named(metrics, "loss", "grad_norm")))
        if self._live.is_started:
            self._bars.start_task(self._warm_start)
            note = " ".join(_named(metrics, "loss"))
            self._bars.update(self._warm_start, total=steps, completed=step, note=note, visible=True)

    def step(self, step: int, metrics: dict[str, Any], accuracy: float | None) -> None:
        """A training step, with the latest held-out accuracy if there is one."""
        self._accuracy = self._accuracy if accuracy is None else accuracy
        self._rates.add(metrics)
        remaining = self._rates.seconds_for(self._steps - step)
        eta = [] if remaining is None else [f"ETA {duration(remaining)}"]
        shown = {"accuracy": self._accuracy, **metrics}
        parts = [*_named(shown, "reward/avg", "accuracy", "loss", "grad_norm"), *_staleness(metrics)]
        logger.info("step %d/%d  %s", step, self._steps, "  ".join([*parts, *self._rates.words(), *eta]))
        if self._live.is_started:
            self._bars.start_task(self._training)
            self._bars.update(self._training, completed=step, note=" ".join(eta))
            figures = [*_named(shown, "reward/avg", "accuracy"), *_staleness(metrics), *self._rates.words()]
            self._live.update(Group(self._bars, _row(figures)), refresh=True)

    def _tell(self, text: str, *, boxed: bool = False) -> None:
        for line in text.splitlines():
            logger.info("%s", line)
        if self._live.is_started:
            plain = Text(text)
            self._console.print(Panel(plain, title=Text(self._title)) if boxed else plain)

    def _redirect_logs(self) -> None:
        """Other people's records go above the display instead of through it; ours are in it already."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._file:
                handler.setStream(sys.stderr)  # while the display is live, a proxy that prints above it
                handler.addFilter(_is_not_ours)
                self._redirected.append(handler)

    def _restore_logs(self) -> None:
        for handler in self._redirected:
            handler.setStream(self._file)
            handler.removeFilter(_is_not_ours)
        self._redirected.clear()


class Rates:
    """Speeds over the last few steps, in the order of the clock's seconds."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT_STEPS)

    def add(self, metrics: dict[str, Any]) -> None:
        """A step's metrics; without its time nothing is known."""
        if seconds := metrics.get("time/step"):
            waited = metrics.get("time/wait_for_samples") or 0.0
            self._recent.append((seconds, waited, metrics.get("tokens/trained") or 0.0))

    def seconds_for(self, steps: int) -> float | None:
        """How long that many steps take."""
        return self._sums()[0] / len(self._recent) * steps if self._recent else None

    def words(self) -> list[str]:
        """Trained tokens per second, and the share of the time that went into waiting for samples."""
        if not self._recent:
            return []
        seconds, waited, tokens = self._sums()
        return [f"{tokens / seconds:,.0f} tokens/s", f"waiting {100 * waited / seconds:.0f}%"]

    def _sums(self) -> tuple[float, float, float]:
        seconds, waited, tokens = (sum(column) for column in zip(*self._recent))
        return seconds, waited, tokens


LABELS = {"reward/avg": "reward", "grad_norm": "grad norm"}
FORMATS = {"loss": ".4g", "grad_norm": ".3g"}


def _named(metrics: dict[str, Any], *names: str) -> list[str]:
    """Name and number of those that are there."""
    return [
        f"{LABELS.get(name, name)} {metrics[name]:{FORMATS.get(name, '.3f')}}"
        for name in names
        if metrics.get(name) is not None
    ]


def _staleness(metrics: dict[str, Any]) -> list[str]:
    average, largest = metrics.get("staleness/avg"), metrics.get("staleness/max")
    if average is None or largest is None:
        return []
    return [f"staleness {average:.2f} (max {largest:.0f})"]


def _row(figures: list[str]) -> Table:
    row = Table.grid(padding=(0, 3))
    row.add_row(*figures)
    return row


def _is_not_ours(record: logging.LogRecord) -> bool:
    return record.name != __name__ or record.levelno > logging.INFO
