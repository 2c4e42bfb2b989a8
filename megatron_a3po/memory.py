"""How much memory this process has used at most. What a GPU has allocated torch knows, see `trainer/step.py`."""

import re
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int | None:
    """The most memory this process has had resident since its program started; None where there is no /proc.

    Not getrusage's ru_maxrss: a started program inherits that from the process that started it.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
