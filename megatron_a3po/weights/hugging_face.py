"""A Hugging Face directory, written while its tensors are gathered by the ranks that hold them.

A rank holds one tensor at a time: every file's header is written before its first tensor. All is written beside the
final name and renamed, so that whoever sees the final name sees all of it. Reading is in `sources.py`.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.config.tokenizer_files import TOKENIZER_FILES
from megatron_a3po.errors import OutputError
from megatron_a3po.weights.aside import aside_of, close_aside, drop_aside, make_durable, noting, open_aside
from megatron_a3po.weights.families import Table
from megatron_a3po.weights.manifest import write_manifest
from megatron_a3po.weights.safetensors_file import Announced, SafetensorsFile, split_by_size

FORMAT = 1
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

# What makes a directory loadable besides its weights.
CONFIGURATION_FILES = ("config.json", "generation_config.json")


def announce(
    parameters: Iterable[tuple[str, torch.dtype]], table: Table, *, ep_size: int = 1
) -> list[Announced]:
    """What `full_tensors` will yield of these Megatron-Core parameters, in its order."""
    return [
        Announced(tensor, size, dtype)
        for name, dtype in parameters
        for owner in table.on_expert_ranks(name, ep_size)
        for tensor, size in table.parameter(owner).tensors.items()
    ]


def write_hugging_face(
    tensors: Iterable[tuple[str, Tensor]],
    announced: Sequence[Announced],
    directory: Path,
    *,
    template: Path,
    peers: dist.ProcessGroup | None,
    lasting: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write full tensors under `directory`. Collective over `peers`; the name is final when it returns.

    announced: what `tensors` brings, in order, on a rank that writes; empty on one that only takes part in gathering.
    template: the Hugging Face directory whose configuration (and tokenizer) go along.
    lasting: for people and not for an engine that reads it at once: with the tokenizer, and a manifest with checksums.
    Errors: OutputError on every rank where a file cannot be written; then nothing is under the final name.
    """
    tensors = iter(tensors)
    is_main = peers is None or dist.get_rank(peers) == 0
    files = split_by_size(announced, max_shard_bytes)
    problems: list[str] = []
    with noting(problems, directory):
        if is_main:
            open_aside(directory)
    names = _names(_exchange(len(files), problems, directory, peers), peers)
    checksums: dict[str, str] = {}
    with noting(problems, directory):
        for name, file in zip(names, files, strict=True):
            checksums |= _write_file(tensors, file, aside_of(directory) / name, with_checksum=lasting)
    for _ in tensors:  # a rank that writes nothing, or no more, still takes part in gathering
        pass
    contents = dict(zip(names, files, strict=True))
    found = _exchange((contents, checksums), problems, directory, peers)
    with noting(problems, directory):
        if is_main:
            for others, sums in found:
                contents |= others
                checksums |= sums
            _finish(directory, template, contents, checksums if lasting else None)
    _exchange(None, problems, directory, peers)


def _names(counts: list[int], peers: dist.ProcessGroup | None) -> list[str]:
    """Of this rank's files, numbered over all ranks."""
    rank = 0 if peers is None else dist.get_rank(peers)
    first, total = sum(counts[:rank]) + 1, sum(counts)
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(first, first + counts[rank])]


def _write_file(
    tensors: Iterator[tuple[str, Tensor]], announced: list[Announced], path: Path, *, with_checksum: bool
) -> dict[str, str]:
    """{file name: checksum}, where asked for."""
    with SafetensorsFile(path, announced, with_checksum=with_checksum) as file:
        for name, tensor in itertools.islice(tensors, len(announced)):
            file.append(name, tensor)
    assert file.is_complete, f"fewer tensors came than were announced for {path}"
    return {path.name: file.checksum} if file.checksum else {}


def _finish(
    directory: Path, template: Path, contents: dict[str, list[Announced]], checksums: dict[str, str] | None
) -> None:
    """Everything besides the weights, then the final name."""
    aside = aside_of(directory)
    index = {
        "metadata": {"total_size": sum(one.num_bytes for file in contents.values() for one in file)},
        "weight_map": dict(sorted((one.name, name) for name, file in contents.items() for one in file)),
    }
    (aside / INDEX).write_text(json.dumps(index, indent=1))
    copy_configuration(template, aside, with_tokenizer=checksums is not None)
    say_dtype(
        aside / "config.json", ((one.dtype, one.num_bytes) for file in contents.values() for one in file)
    )
    if checksums is not None:
        write_manifest(aside, FORMAT, checksums)
        make_durable(aside)
    close_aside(directory)


def copy_configuration(template: Path, directory: Path, *, with_tokenizer: bool = True) -> None:
    """What makes weights a model that others can load."""
    for name in CONFIGURATION_FILES + (TOKENIZER_FILES if with_tokenizer else ()):
        if (template / name).is_file():
            shutil.copyfile(template / name, directory / name)


def say_dtype(config: Path, tensors: Iterable[tuple[torch.dtype, int]]) -> None:
    """config.json names the precision of most of the weights, given with the bytes of each.

    The file stays as it is where that is true already.
    """
    sizes: Counter[torch.dtype] = Counter()
    for dtype, num_bytes in tensors:
        sizes[dtype] += num_bytes
    name = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    values: dict[str, Any] = json.loads(config.read_text())
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    if values.get(key) != name:
        config.write_text(json.dumps({**values, key: name}, indent=2) + "\n")


def _exchange(own: Any, problems: list[str], directory: Path, peers: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's `own`; or, where any rank had a problem, the same error on all of them."""
    found: list[tuple[Any, list[str]]] = [(own, problems)]
    if peers is not None:
        found = [(None, [])] * dist.get_world_size(peers)
        dist.all_gather_object(found, (own, problems), group=peers)
    if every := [problem for _, theirs in found for problem in theirs]:
        if peers is None or dist.get_rank(peers) == 0:
            drop_aside(directory)
        raise OutputError(dict.fromkeys(every))
    return [one for one, _ in found]
