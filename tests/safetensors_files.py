"""Safetensors files byte by byte, damaged ones too, without torch."""

import json
import struct
from pathlib import Path

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I32": 4}

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> type, shape


def safetensors_bytes(tensors: Tensors) -> bytes:
    """A file of zeros."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(end)


def write_shards(folder: Path, shards: dict[str, Tensors], index: dict[str, str] | None = None) -> Path:
    """Weight files in `folder`, with an index if one is given (tensor -> file)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        (folder / name).write_bytes(safetensors_bytes(tensors))
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
