"""Pages in a real browser: Chromium without a window, with a profile of its own that is thrown away."""

import functools
import re
import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

LEFT_OUT = "no Chromium: `apt-get install chromium`"
TIMEOUT_S = 120
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
    ),
]


@dataclass(frozen=True)
class Opened:
    """The document after its scripts, what they said on the console, and the processor time of the whole browser, which
    unlike the time on the wall is the page's own however busy the machine is."""

    document: str
    console: list[str]
    cpu_s: float

    def noted(self, name: str) -> str:
        """The value of data-<name> of the root element, which scripts leave notes in."""
        found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', self.document)
        assert found, f"no data-{name}; console: {self.console}"
        return found.group(1)


@functools.cache
def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def open_page(
    page: Path, *, width: int = 1280, dark: bool = False, first: str = "", then: str = "", waits_ms: int = 0
) -> Opened:
    """Open a file from disk; `first` and `then` are scripts that run before its own and at the end of it, with timers
    of up to `waits_ms`, of the browser's own time. Skips where there is no browser."""
    if (program := chromium()) is None:
        pytest.skip(LEFT_OUT)
    with tempfile.TemporaryDirectory() as folder:
        opened = page
        if first or then:
            opened = Path(folder) / "page.html"
            script = f"<script>queueMicrotask(() => {{ {then} }});</script></body>"
            text = page.read_text().replace("</body>", script)
            opened.write_text(text.replace("<body>", f"<body><script>{first}</script>", 1))
        before = _cpu_s_of_children()
        ended = subprocess.run(
            [
                program,
                *OPTIONS,
                f"--user-data-dir={folder}/profile",
                f"--window-size={width},900",
                *([f"--virtual-time-budget={waits_ms}"] if waits_ms else []),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                "--dump-dom",
                opened.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    said = re.findall(r"^\[.*CONSOLE.*$", ended.stderr, re.MULTILINE)
    return Opened(ended.stdout, said, _cpu_s_of_children() - before)


def _cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
