"""What is in the actor's part of a checkpoint, read in one process and whatever layout wrote it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def read_tensors(actor: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, whole: weights, moments, master weights."""
    reader = FileSystemReader(actor)
    found = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(item.size, dtype=item.properties.dtype)
        for name, item in found.items()
        if isinstance(item, TensorStorageMetadata)
    }
    with _in_one_process():
        load(state, storage_reader=reader, no_dist=True)
    return state


def read_plain(actor: Path) -> str:
    """All that is no tensor of the model, written out: rates, counts of Adam and of the schedule."""
    with _in_one_process():
        return repr(dist_checkpointing.load_common_state_dict(str(actor)))


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Without the warnings that this is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
