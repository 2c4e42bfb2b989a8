"""Logging, set up once in each process: rank 0 speaks on stderr, every process has a file under <run_dir>/logs/.

Every record says which process it is of and in which training step it was made. What went wrong is in the last lines
of the file of the process that died: uncaught exceptions and fatal signals are written there too. Metrics are not
logs, see `trainer/`.
"""

import faulthandler
import logging
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

FILE_FORMAT = "%(asctime)s %(process_name)s step %(step)s %(levelname)s %(name)s: %(message)s"
SPOKEN_FORMAT = "%(asctime)s %(message)s"
SPOKEN_WARNING_FORMAT = "%(asctime)s %(levelname)s (%(process_name)s, step %(step)s): %(message)s"

PACKAGE = "megatron_a3po"


class StepFilter(logging.Filter):
    """Puts the process's name and its current training step into every record."""

    def __init__(self, process_name: str):
        super().__init__()
        self.process_name = process_name
        self.step: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        record.process_name = self.process_name
        record.step = "-" if self.step is None else self.step
        return True


class SpokenFormatter(logging.Formatter):
    """Plain lines for a person; warnings say where they come from."""

    def __init__(self):
        super().__init__(SPOKEN_FORMAT, "%H:%M:%S")
        self.warning = logging.Formatter(SPOKEN_WARNING_FORMAT, "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return self.warning.format(record) if record.levelno >= logging.WARNING else super().format(record)


class LogFile(logging.FileHandler):
    """A full disk takes records, not the run, and not a traceback for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def set_up_logs(run_dir: str | Path | None, process_name: str, *, speaks: bool) -> StepFilter:
    """Send this process's records to <run_dir>/logs/<process_name>.log, and to stderr if it `speaks`.

    `process_name` is `rank-3` or `rollout`. Returns the filter whose `step` the loop sets. A second call replaces
    what the first one did, so that a forked process can take its own name.
    """
    root = logging.getLogger()
    shut_down_logs()
    step = StepFilter(process_name)
    handlers: list[logging.Handler] = []
    if run_dir is not None:
        folder = Path(run_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        to_file = LogFile(folder / f"{process_name}.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter(FILE_FORMAT))
        handlers.append(to_file)
        assert to_file.stream is not None, "a FileHandler opens its file at once"
        faulthandler.enable(to_file.stream)
    if speaks:
        to_person = logging.StreamHandler(sys.stderr)
        to_person.setFormatter(SpokenFormatter())
        # Warnings of libraries go to the file: a person at the start of a run can do nothing about them.
        to_person.addFilter(lambda record: record.name != "py.warnings")
        handlers.append(to_person)
    for handler in handlers or [logging.NullHandler()]:
        handler.addFilter(step)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    return step


def shut_down_logs() -> None:
    """Undo `set_up_logs`: close the files, and let the next process name take over."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if _is_ours(handler)]:
        root.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            faulthandler.disable()
        handler.close()
    logging.captureWarnings(False)
    sys.excepthook = sys.__excepthook__


def _is_ours(handler: logging.Handler) -> bool:
    return any(isinstance(item, StepFilter) for item in handler.filters)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(PACKAGE).critical("ended by an exception nobody caught", exc_info=(kind, error, trace))
    if not any(
        isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
        for handler in logging.getLogger().handlers
    ):
        sys.__excepthook__(kind, error, trace)
