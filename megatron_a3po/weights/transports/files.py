"""The transport `files`: a version is a Hugging Face directory that servers read. They must see the trainer's files."""

from collections.abc import Callable
from pathlib import Path

from megatron_a3po.weights.transports.base import Export


class FilesTransport:
    def publish(self, export: Export, version: int, directory: Path, announce: Callable[[], None]) -> None:
        export.write(directory, lasting=False)
        if export.is_main:
            announce()

    def close(self) -> None:
        pass
