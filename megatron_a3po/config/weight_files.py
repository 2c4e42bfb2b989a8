"""The weight files of a Hugging Face folder by their headers: which tensors there are, of which type and size.

A safetensors file begins with the length of its header (8 bytes) and the header, a JSON object. So all that a file
claims is known without reading a weight and without torch. Whether it is what the model's family needs is looked
at in `weights/sources.py`, which also reads the tensors. Files that would have to be unpickled are never opened.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a3po.config.json_file import read_json_object
from megatron_a3po.config.model_shape import ModelShape
from megatron_a3po.config.problem import shown
from megatron_a3po.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("F64", "F32", "F16", "BF16")
EMBEDDING = "model.embed_tokens.weight"
LFS_POINTER = b"version https://git-lfs"
NAMED_AT_MOST = 3
LARGEST_HEADER = 100 * 2**20  # safetensors itself refuses longer ones


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of one of its tensors. `dtype` is safetensors' name for it, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_problems(folder: Path, shape: ModelShape, *, or_else: str = "") -> Iterator[str]:
    """One sentence for each thing wrong with the weight files of a model of this shape, by their headers alone.

    or_else: what one may do besides where there are none.
    """
    try:
        headers = read_headers(folder, or_else=or_else)
    except InputError as error:
        yield from error.problems
        return
    embedding = headers.get(EMBEDDING)
    if embedding and embedding.shape[:1] != (shape.vocab_size,):
        yield (
            f"{embedding.file} has {EMBEDDING} for a vocabulary of {(*embedding.shape, 0)[0]}, but config.json has "
            f"vocab_size={shape.vocab_size}: weights and config.json must be of the same model."
        )


def read_headers(folder: Path, *, or_else: str = "") -> dict[str, TensorHeader]:
    """Every tensor in the folder's weight files. Errors: InputError with a sentence for each file that is not whole,
    for tensors that lie in two files, that the index names and no file holds, or that are quantised."""
    headers: dict[str, TensorHeader] = {}
    problems = []
    for file in weight_files(folder, or_else=or_else):
        try:
            own = _headers_of(file)
        except InputError as error:
            problems += error.problems
            continue
        if twice := [name for name in own if name in headers]:
            problems.append(
                f"{listed(twice)} lies in {headers[twice[0]].file} and in {file}: remove the file that does not "
                "belong."
            )
        headers |= own
    if not problems:
        problems += [*_not_held(folder, headers), *_quantised(headers)]
    if problems:
        raise InputError(problems)
    return headers


def weight_files(folder: Path, *, or_else: str = "") -> list[Path]:
    """The safetensors files of the model in `folder`: those its index names, the one file, or all there are."""
    index, one = folder / INDEX_FILE, folder / ONE_FILE
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        if one.is_file() and one not in files:
            raise InputError(
                f"{folder} has both {ONE_FILE} and {INDEX_FILE}, which does not name it: remove one."
            )
    else:
        files = [one] if one.is_file() else sorted(folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{index} names {listed(missing)}, which is missing: copy it there.")
    if not files:
        raise InputError(_without_safetensors(folder, or_else))
    return files


def _without_safetensors(folder: Path, or_else: str) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return f"{folder} has no *.safetensors: give the folder of a Hugging Face checkpoint{or_else}."
    # Loading a pickle runs what is in it, so that is left to the user.
    convert = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
        f".save_pretrained('{folder}-safetensors')"
    )
    return (
        f"{folder} has its weights only as {listed(pickles)}, a pickle that could run any code and is not read: "
        f'if you trust its origin, write it as safetensors with python -c "{convert}" and copy the tokenizer along.'
    )


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json_object(index, "copy it there anew").get("weight_map")
    if not isinstance(found, dict):
        raise InputError(
            f"{index} is no index of weight files: weight_map is {shown(found)}, but must be a mapping from tensors to "
            "files; copy it there anew."
        )
    for name, file in found.items():
        if not isinstance(file, str):
            raise InputError(
                f"{index}: {name} in weight_map is {shown(file)}, but must be the name of a file: copy it there anew."
            )
    return found


def _not_held(folder: Path, headers: Mapping[str, TensorHeader]) -> Iterator[str]:
    index = folder / INDEX_FILE
    for name, file in _weight_map(index).items() if index.is_file() else ():
        if name not in headers or headers[name].file != folder / file:
            yield f"{index} says that {name} lies in {file}, which does not hold it: copy index and files there anew."
            return


def _headers_of(file: Path) -> dict[str, TensorHeader]:
    try:
        return _read_headers_of(file)
    except OSError as error:
        raise InputError(f"{file} is not readable ({error.strerror}): give leave to read it.") from None


def _read_headers_of(file: Path) -> dict[str, TensorHeader]:
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise InputError(
                f"{file} is a Git LFS pointer and not the file itself: run git lfs pull in its folder."
            )
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > LARGEST_HEADER:
            raise InputError(f"{file} is no safetensors file: copy or download it again.")
        stream.seek(8)
        text = stream.read(length)
    size = file.stat().st_size
    try:
        entries: dict[str, Any] = json.loads(text) if len(text) == length else {}
        entries.pop("__metadata__", None)
        wanted = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {
            name: TensorHeader(file, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise InputError(f"{file} is no safetensors file: copy or download it again.") from None
    if size != wanted:
        what = "is cut short" if size < wanted else "is longer than its header says"
        raise InputError(f"{file} {what} ({size} bytes instead of {wanted}): copy or download it again.")
    return found


def _quantised(headers: Mapping[str, TensorHeader]) -> Iterator[str]:
    other = [name for name, header in headers.items() if header.dtype not in FLOATS]
    if other:
        header = headers[other[0]]
        yield (
            f"{header.file} has {listed(other)} as {header.dtype}, but only {', '.join(FLOATS)} can be trained: take "
            "weights that are not quantised."
        )


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
