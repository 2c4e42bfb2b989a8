"""The transport `files`: a version is a Hugging Face directory that servers read. They must see the trainer's files."""

from collections.abc import Callable
from pathlib import Path

from megatron_a3po.weights.hugging_face import write_hugging_face
from megatron_a3po.weights.transports.base import Export


class FilesTransport:
    def publish(self, export: Export, version: int, directory: Path, announce: Callable[[], None]) -> None:
        write_hugging_face(
            export.tensors,
            export.announced,
            directory,
            template=export.template,
            peers=export.host_group,
            lasting=False,
        )
        if export.is_main:
            announce()

    def close(self) -> None:
        pass
