"""What is in the actor's part of a checkpoint, read without Megatron-Core."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def read_tensors(actor: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, whole: weights, moments, master weights."""
    reader = dcp.FileSystemReader(actor)
    found = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(item.size, dtype=item.properties.dtype)
        for name, item in found.items()
        if isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is one process
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state
