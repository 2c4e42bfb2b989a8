"""A file of JSON objects, one a line, that survives being killed at any moment.

Every row is one write, so that a reader sees whole rows and at most one torn line at the end; what a killed process
left torn is cut off by the next one that appends. Numbers without a JSON form become null. No torch here.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends rows to `path`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(plain(row), allow_nan=False, ensure_ascii=False)
        # A lone surrogate, which JSON data may hold, has no UTF-8 form.
        self._file.write(line.encode("utf-8", "replace") + b"\n")

    def close(self) -> None:
        self._file.close()


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


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
