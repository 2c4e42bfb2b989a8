"""How it stands with a run that has left no summary: whether it goes on, and what its logs say last if it does not."""

import fcntl
import re
from pathlib import Path

RECORD = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \S+ step \S+ ([A-Z]+) \S+: (.*)$")
FATAL = "Fatal Python error"
TAIL_BYTES = 65_536


def is_running(run_dir: Path) -> bool:
    """Whether somebody holds its lock."""
    try:
        with (run_dir / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none there, or a file system without locks
        return False
    return False


def last_error(run_dir: Path) -> str | None:
    """What went wrong, in a line: the latest error that a process of the run ended with."""
    found = [error for file in sorted((run_dir / "logs").glob("*.log")) if (error := _of_log(file))]
    return max(found)[1] if found else None


def _of_log(file: Path) -> tuple[str, str] | None:
    """Time and line of the error that a log ends with; None where it ends well."""
    try:
        with file.open("rb") as log:
            log.seek(max(file.stat().st_size - TAIL_BYTES, 0))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    start = next((i for i in reversed(range(len(lines))) if RECORD.match(lines[i])), None)
    if start is None:
        return None
    match = RECORD.match(lines[start])
    assert match
    time, level, message = match.groups()
    rest = [line.strip() for line in lines[start + 1 :] if line.strip()]
    if fatal := [line for line in rest if line.startswith(FATAL)]:
        return time, f"{file.stem}: {fatal[-1]}"
    if level not in ("ERROR", "CRITICAL"):
        return None
    return time, f"{file.stem}: {message}" + (f" {rest[-1]}" if rest else "")
