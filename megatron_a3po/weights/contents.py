"""What has been written into a distributed checkpoint and where: torch's `.metadata` in the making.

Used by whoever writes the format: the converter (`megatron_checkpoint.py`), and the trainer (`actor/checkpoint.py`),
whose ranks each have their own and put them together at the end.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_a3po.weights.aside import WrittenFile


class Contents:
    """Tensors and objects by name, with the place of every chunk."""

    def __init__(self) -> None:
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    @classmethod
    def of_all(cls, parts: Sequence["Contents"]) -> "Contents":
        """What several ranks have written, each its own chunks."""
        whole = cls()
        for part in parts:
            whole._places |= part._places
            for key, one in part._tensors.items():
                known = whole._tensors.setdefault(key, one)
                if known is not one and isinstance(one, TensorStorageMetadata):
                    assert isinstance(known, TensorStorageMetadata)
                    known.chunks.extend(one.chunks)
        return whole

    def add(
        self, file: WrittenFile, key: str, full_size: tuple[int, ...], offset: tuple[int, ...], chunk: Tensor
    ) -> None:
        described = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(full_size), [])
        )
        assert isinstance(described, TensorStorageMetadata)
        described.chunks.append(ChunkStorageMetadata(torch.Size(offset), chunk.shape))
        self._places[MetadataIndex(key, offset)] = _append(file, chunk)

    def add_object(self, file: WrittenFile, key: str, value: Any) -> None:
        self._tensors[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = _append(file, value)

    def sizes(self) -> Iterator[tuple[torch.dtype, int]]:
        """Of every tensor, its precision and bytes."""
        for one in self._tensors.values():
            if isinstance(one, TensorStorageMetadata):
                yield one.properties.dtype, one.size.numel() * one.properties.dtype.itemsize

    def check(self) -> None:
        """Every element of every tensor lies somewhere, once."""
        for key, one in self._tensors.items():
            if isinstance(one, TensorStorageMetadata):
                written = sum(chunk.sizes.numel() for chunk in one.chunks)
                assert written == one.size.numel(), f"{key}: {written} elements written of {one.size.numel()}"

    def metadata(self) -> Metadata:
        return Metadata(
            self._tensors, storage_data=self._places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
        )


def _append(file: WrittenFile, value: Any) -> _StorageInfo:
    start = file.tell()
    try:
        torch.save(value, file)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:  # torch's own, about the archive that could not be ended
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise file.failure or RuntimeError(f"{file.path} could not be written") from None
    return _StorageInfo(file.path.name, start, file.tell() - start)
