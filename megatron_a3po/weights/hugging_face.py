"""A Hugging Face directory written by the ranks that hold its tensors: one safetensors file per pipeline stage.

Written beside its final name and renamed, so that whoever sees the final name sees all of it.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

# What makes a directory loadable besides its weights.
CONFIGURATION_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def write_hugging_face(
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    *,
    template: Path,
    stage: int,
    num_stages: int,
    writes: bool,
    host_group: dist.ProcessGroup,
    with_tokenizer: bool,
) -> None:
    """Write this stage's full tensors under `directory`. Collective over all ranks; the name is final when it returns.

    template: the Hugging Face directory whose configuration and tokenizer go along.
    writes: true on one rank per stage; the others only take part in gathering.
    """
    aside = directory.with_name(directory.name + ".tmp")
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier(group=host_group)
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors if writes}
    file_name = f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"
    if writes:
        save_file(held, aside / file_name, metadata={"format": "pt"})
    entries: list[tuple[str, str, int]] = [
        (name, file_name, tensor.numel() * tensor.element_size()) for name, tensor in held.items()
    ]
    gathered: list[list[tuple[str, str, int]]] | None = (
        [[] for _ in range(dist.get_world_size())] if is_main else None
    )
    dist.gather_object(entries, gathered, group=host_group)
    if is_main and gathered is not None:
        _finish(aside, directory, template, [entry for part in gathered for entry in part], with_tokenizer)
    dist.barrier(group=host_group)


def _finish(
    aside: Path, directory: Path, template: Path, entries: list[tuple[str, str, int]], with_tokenizer: bool
) -> None:
    index = {
        "metadata": {"total_size": sum(size for _, _, size in entries)},
        "weight_map": {name: file_name for name, file_name, _ in sorted(entries)},
    }
    (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in CONFIGURATION_FILES + (TOKENIZER_FILES if with_tokenizer else ()):
        if (template / name).is_file():
            shutil.copyfile(template / name, aside / name)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)
