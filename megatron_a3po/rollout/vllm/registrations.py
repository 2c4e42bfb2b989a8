"""The servers that `rollout.servers_file` names, looked up again and again: a pool may grow and shrink under a run.

Either a file with one URL a line, or a folder with one file `NAME.url` for each server, whose first line is the URL.
A folder suits servers that come and go by themselves: each writes its own file once it answers, aside and renamed,
and takes it away before it ends. Where one failed so that only a new start helps, `NAME.failed` appears beside it.
`plugin/a3po_vllm/registered.py` is the server's side of this, `fleet.py` uses what is found here.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_a3po.config.vllm_checks import is_url
from megatron_a3po.rollout.vllm.places import GivenPlace
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.rollout.vllm.wire import Unreachable

logger = logging.getLogger(__name__)

REGISTERED, FAILED = ".url", ".failed"


class RegisteredPlace(GivenPlace):
    """A server that registered itself, and is started again where it is told that it failed."""

    def __init__(self, url: str, file: Path, connect: Callable[[str], Server], timeout_s: float) -> None:
        super().__init__(url, connect, timeout_s)
        self._file = file

    async def open(self) -> Server:
        try:
            return await super().open()
        except Unreachable:
            if self._file.is_file():
                self._file.with_suffix(FAILED).touch()
            raise


class Registrations:
    """Where the servers are now; a server keeps its place for as long as it is named."""

    def __init__(self, path: Path, connect: Callable[[str], Server], timeout_s: float) -> None:
        self._path = path
        self._connect = connect
        self._timeout_s = timeout_s
        self._places: dict[str, GivenPlace] = {}
        self._wrong: set[str] = set()

    async def find(self) -> Sequence[GivenPlace]:
        named = dict(await asyncio.to_thread(lambda: list(self._read())))  # a shared disk may be slow
        self._places = {url: self._places.get(url) or self._place(url, file) for url, file in named.items()}
        return list(self._places.values())

    def _place(self, url: str, file: Path | None) -> GivenPlace:
        if file is None:
            return GivenPlace(url, self._connect, self._timeout_s)
        return RegisteredPlace(url, file, self._connect, self._timeout_s)

    def _read(self) -> Iterator[tuple[str, Path | None]]:
        """Every URL, and the file of its own where it has one; what is no URL is said once and left out."""
        if self._path.is_dir():
            texts = [(file, _first_line(file)) for file in sorted(self._path.glob(f"*{REGISTERED}"))]
            pairs = [(text, file) for file, text in texts if text]
        else:
            pairs = [(text, None) for text in _text(self._path).split()]
        for text, file in pairs:
            if is_url(text):
                yield text, file
            elif text not in self._wrong:
                self._wrong.add(text)
                logger.warning(
                    "rollout.servers_file: %s has %r, which is no URL such as http://10.0.0.5:8000; it is left out",
                    file or self._path,
                    text,
                )


def _first_line(file: Path) -> str:
    return _text(file).partition("\n")[0].strip()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:  # not there yet, or no more
        return ""
