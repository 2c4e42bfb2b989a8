"""A file of JSON objects, one a line, that survives being killed at any moment, and a full disk.

Every row is one write, so that a reader sees whole rows and at most one torn line at the end; what a killed process
left torn is cut off by the next one that appends. What cannot be written is cut off at once and waits in memory.
Numbers without a JSON form become null. No torch here.
"""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends rows to `path`. Nothing here raises because the disk is full: that is said once, and the rows wait."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._waiting: deque[bytes] = deque()
        self._is_stuck = False
        self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(plain(row), allow_nan=False, ensure_ascii=False)
        # A lone surrogate, which JSON data may hold, has no UTF-8 form.
        self._waiting.append(line.encode("utf-8", "replace") + b"\n")
        self._write()

    def close(self) -> None:
        self._write()
        if self._waiting:
            logger.error("%d rows of %s are lost", len(self._waiting), self._path)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _write(self) -> None:
        try:
            self._file = self._file or _opened(self._path)
            while self._waiting:
                _write_whole(self._file, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._is_stuck:
                logger.error(
                    "%s cannot be written (%s): its rows wait in memory, and the run goes on; free some space",
                    self._path,
                    error.strerror,
                )
            self._is_stuck = True
        else:
            self._is_stuck = False


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, none if it is not there. A line that is no row is passed over, with a warning unless it is
    the torn last one."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.endswith(b"\n"):
                logger.warning("%s:%d is not a JSON object and is passed over", path, number)


def plain(value: Any) -> Any:
    """The same in what strict JSON has: arrays and tensors as lists and numbers, NaN and infinities as null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case Path():
            return str(value)
        case _ if hasattr(value, "tolist"):
            return plain(value.tolist())
        case _:
            raise TypeError(f"{value!r} has no JSON form")


def _opened(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)
    return path.open("ab", buffering=0)


def _write_whole(file: FileIO, row: bytes) -> None:
    """All of a row or nothing of it. Errors: OSError."""
    start, written = os.fstat(file.fileno()).st_size, 0
    try:
        while written < len(row):  # a write stops short where the disk ends
            written += file.write(row[written:])
    except OSError:
        file.truncate(start)
        raise


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
