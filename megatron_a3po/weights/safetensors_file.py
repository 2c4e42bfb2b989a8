"""A safetensors file written tensor by tensor.

The library's own writer wants every tensor of the file at once, which for a large model is more memory than a rank has
to spare. The format lets us do without: the length of a header, the header (JSON: name, dtype, shape, place), then the
bytes of the tensors one after another. Names, dtypes and shapes are known before the first tensor is gathered.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_a3po.weights.aside import WrittenFile

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Announced:
    """A tensor that will come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A context in which the announced tensors are appended, in their order. Errors: OSError names the file."""

    def __init__(self, path: Path, announced: Sequence[Announced], *, with_checksum: bool) -> None:
        self._announced, self._num_written = list(announced), 0
        self._file = WrittenFile(path, with_checksum=with_checksum)
        self._file.write(_header(announced))

    def append(self, name: str, tensor: Tensor) -> None:
        """The next tensor; from any device, freed by the caller."""
        wanted = self._announced[self._num_written]
        assert (name, tuple(tensor.shape), tensor.dtype) == (wanted.name, wanted.shape, wanted.dtype), (
            f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {wanted} was announced"
        )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)
        self._num_written += 1

    @property
    def is_complete(self) -> bool:
        return self._num_written == len(self._announced)

    @property
    def checksum(self) -> str | None:
        """Of what has been written, where asked for."""
        return self._file.checksum

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def split_by_size(announced: Iterable[Announced], max_bytes: int) -> list[list[Announced]]:
    """In order, as many together as fit into a file; a larger tensor is a file of its own."""
    files: list[list[Announced]] = []
    room = 0
    for one in announced:
        if not files or one.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(one)
        room -= one.num_bytes
    return files


def _header(announced: Sequence[Announced]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in announced:
        end = offset + one.num_bytes
        entries[one.name] = {
            "dtype": DTYPE_NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
