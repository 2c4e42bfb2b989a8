"""The pickles in a distributed checkpoint, looked at before anybody loads them: they may make data, and nothing else.

Megatron-Core reads three with more trust than a checkpoint of somebody else's deserves: `.metadata` (torch's
reader, plain pickle), every stored object that is no tensor, the common state of newer checkpoints among them
(torch's planner, `weights_only=False`), and `common.pt` (torch.load, whose default an environment variable turns
off). Here the first is read with a short list of torch's own record classes, and the others as torch reads weights
only. What makes more is refused, by the name of its file; what is left can then be given to Megatron-Core. Tensors
are always read as weights only.
"""

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_a3po.errors import InputError

COMMON_FILE = "common.pt"
METADATA_FILE = ".metadata"
# What torch writes into `.metadata`, as `save` of 2.10 and later does it.
RECORDS = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


def refuse_code(directory: Path) -> None:
    """Errors: InputError names the file of a distributed checkpoint whose pickle asks for more than data."""
    metadata = read_metadata(directory)
    common = directory / COMMON_FILE
    if common.is_file():
        _weights_only(common, common.read_bytes())
    for file, content in _objects(directory, metadata):
        _weights_only(file, content)


def read_metadata(directory: Path) -> Metadata:
    """What is in a distributed checkpoint, and where. Errors: InputError names the file."""
    file = directory / METADATA_FILE
    try:
        with file.open("rb") as stream:
            metadata = _RecordUnpickler(stream).load()
    except FileNotFoundError:
        raise InputError(
            f"{file} is not there: {directory} is no distributed checkpoint of Megatron-Core."
        ) from None
    except Exception as error:  # what a damaged pickle raises can be anything
        raise _refused(file, error) from None
    if not isinstance(metadata, Metadata):
        raise _refused(file, TypeError(f"it holds a {type(metadata).__name__}"))
    held = vars(metadata)
    if not all(isinstance(held.get(part), dict) for part in ("state_dict_metadata", "storage_data")):
        raise _refused(file, ValueError("it does not say which tensors lie where"))
    return metadata


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in RECORDS.get(module_name, ()):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _objects(directory: Path, metadata: Metadata) -> Iterator[tuple[Path, bytes]]:
    """(file, pickle) of every stored object that is no tensor."""
    for index, place in (metadata.storage_data or {}).items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            file = directory / place.relative_path
            if place.transform_descriptors or not file.is_file():
                raise _refused(file, ValueError("it is compressed or missing"))
            with file.open("rb") as stream:
                stream.seek(place.offset)
                yield file, stream.read(place.length)


def _weights_only(file: Path, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # what a damaged pickle raises can be anything
        raise _refused(file, error) from None


def reason(error: BaseException) -> str:
    """What a reader of damaged files says, in one line."""
    if wanted := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {wanted[1]}"
    first = next(iter(str(error).strip().splitlines()), "")
    if first.startswith("Weights only load failed"):  # and torch goes on to advise trusting it
        return "it holds no weights"
    return first or type(error).__name__


def _refused(file: Path, error: Exception) -> InputError:
    return InputError(
        f"{file} is not loaded, since it is damaged or would run code ({reason(error)}): take a checkpoint that this "
        "program has written."
    )
