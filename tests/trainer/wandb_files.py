"""Reads what Weights & Biases writes offline: protocol buffers in LevelDB's log format, in blocks of 32 KiB."""

import importlib
import json
import struct
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

BLOCK, HEADER, FILE_HEADER = 1 << 15, 7, 7
LEFT_OUT = "no Weights & Biases: `pip install megatron_a3po[wandb]`"
LAST_TYPES = (1, 4)  # a record in one piece, the last piece of several


def needs_wandb() -> None:
    try:
        version("wandb")
    except PackageNotFoundError:
        pytest.skip(LEFT_OUT)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Every row of the latest attempt's file, without what W&B adds (names that begin with an underscore)."""
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    file = max((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    for payload in records(file.read_bytes()):
        record = protocol.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
            rows.append(
                {name: json.loads(items[name].value_json) for name in items if not name.startswith("_")}
            )
    return rows


def records(content: bytes) -> Iterator[bytes]:
    place, pieces = FILE_HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pieces += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in LAST_TYPES:
            yield pieces
            pieces = b""
