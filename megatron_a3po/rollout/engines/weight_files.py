"""Weights of a Hugging Face directory, read strictly: every parameter once, by name and by shape, nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megatron_a3po.errors import RolloutError


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of the directory's safetensors files, in host memory."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        loaded = load_file(file)
        if twice := tensors.keys() & loaded.keys():
            raise RolloutError(f"{file}: {sorted(twice)[0]} is in another file of the directory too.")
        tensors.update(loaded)
    return tensors


def check_weights(model: Any, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are not exactly the model's. A tied output projection may be there or not."""
    # Tied parameters come once, under their first name.
    parameters = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    missing = sorted(parameters.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - parameters.keys() - aliases)
    if missing or surplus:
        raise RolloutError(
            f"{source}: not the weights of this model: missing {missing[:5]}, surplus {surplus[:5]}."
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            found, wanted = list(tensors[name].shape), list(parameter.shape)
            raise RolloutError(f"{source}: {name} has shape {found}, the model wants {wanted}.")


def copy_weights(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked weights into the model in place. Call under `torch.no_grad`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
