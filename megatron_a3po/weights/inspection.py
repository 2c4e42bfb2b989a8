"""What a checkpoint on disk holds, read from headers and metadata alone: no weight is loaded."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a3po.config.weight_files import read_headers
from megatron_a3po.errors import InputError
from megatron_a3po.weights.manifest import MANIFEST
from megatron_a3po.weights.megatron_reader import MegatronReader, megatron_directory
from megatron_a3po.weights.safetensors_file import DTYPE_NAMES

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Held:
    """Tensors of one name (or of one pattern of names), shape and precision."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    count: int = 1


@dataclass(frozen=True)
class Inspection:
    """`facts` are for reading: what it is, of which model, by whom. `tensors` are the model's, no optimizer's."""

    facts: dict[str, str]
    tensors: list[Held]


def inspect(path: Path) -> Inspection:
    """Errors: InputError where there is no checkpoint, or a damaged one."""
    if megatron_directory(path) is not None:
        return _megatron(path)
    if (path / "config.json").is_file():
        return _hugging_face(path)
    raise InputError(
        f"{path} is no checkpoint: give a Hugging Face folder (config.json), a distributed checkpoint of Megatron-Core "
        "(.metadata), or one of a run (checkpoints/step-<n>)"
    )


def by_pattern(tensors: Iterable[Held]) -> list[Held]:
    """Tensors that differ only in the numbers in their names, together; in the order of their first."""
    groups: dict[tuple[str, tuple[int, ...], str], list[Held]] = {}
    for one in tensors:
        groups.setdefault((_NUMBER.sub("*", one.name), one.shape, one.dtype), []).append(one)
    return [
        Held(pattern, shape, dtype, sum(one.num_bytes for one in group), len(group))
        for (pattern, shape, dtype), group in groups.items()
    ]


def _hugging_face(path: Path) -> Inspection:
    headers = read_headers(path)
    config = _json(path / "config.json")
    files = sorted({header.file.name for header in headers.values()})
    tensors = [
        Held(name, one.shape, one.dtype, math.prod(one.shape) * _BYTES[one.dtype])
        for name, one in headers.items()
    ]
    facts = {"kind": "Hugging Face checkpoint", "model": _model(config), "files": _files(files)}
    return Inspection({**facts, **_sizes(path, tensors)}, tensors)


def _megatron(path: Path) -> Inspection:
    reader = MegatronReader(path)
    files = sorted(file.name for file in reader.directory.glob("*.distcp"))
    tensors = [
        Held(key, tuple(one.size), DTYPE_NAMES.get(one.properties.dtype, str(one.properties.dtype)),
             math.prod(one.size) * one.properties.dtype.itemsize)
        for key, one in reader.tensors.items()
    ]  # fmt: skip
    config_file, trainer = reader.template / "config.json", reader.directory.resolve().parent / "trainer.json"
    facts = {"kind": "distributed checkpoint of Megatron-Core"}
    if reader.directory.resolve().name == "actor" and trainer.is_file():
        step = _json(trainer).get("step", "not said")
        facts = {
            "kind": "checkpoint of a run (distributed, Megatron-Core)",
            "step": str(step),
            "version": str(step),
        }
    facts["model"] = _model(_json(config_file)) if config_file.is_file() else "not said"
    layout = dict(reader.layout)
    facts["Megatron-Core"] = layout.pop("megatron_core", "none, converted" if layout else "not said")
    facts["layout"] = ", ".join(f"{key}={value}" for key, value in layout.items()) or "not said"
    ranks = {file.split("_")[2] for file in files}
    facts["files"] = f"{_files(files)}, written by {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
    states = reader.optimizer_tensors.values()
    size = sum(math.prod(one.size) * one.properties.dtype.itemsize for one in states)
    facts["optimizer state"] = f"{len(states)} tensors, {in_words(size)}" if states else "none"
    return Inspection({**facts, **_sizes(path, tensors)}, tensors)


def in_words(num_bytes: int) -> str:
    """A size as a person reads it."""
    size, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def _model(config: dict[str, Any]) -> str:
    return (
        f"{config.get('model_type')}, {config.get('num_hidden_layers')} layers, hidden {config.get('hidden_size')}, "
        f"vocabulary {config.get('vocab_size')}"
    )


def _json(file: Path) -> dict[str, Any]:
    """Errors: InputError where it is no JSON object."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable as JSON ({error}): copy it there anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no JSON object: copy it there anew")
    return found


def _files(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} ({names[0]} to {names[-1]})"


def _sizes(path: Path, tensors: list[Held]) -> dict[str, str]:
    number = sum(math.prod(one.shape) for one in tensors)
    return {
        "tensors": f"{len(tensors)}, {number:,} numbers, {in_words(sum(one.num_bytes for one in tensors))}",
        "manifest": "yes" if (path / MANIFEST).is_file() else "none",
    }


_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
