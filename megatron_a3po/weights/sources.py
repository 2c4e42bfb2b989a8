"""Where full tensors by Hugging Face name come from: safetensors files, or one seed.

Files are strict both ways: what the family's table asks for must be there in its size, and what it does not know must
not. All of that is read from the files' headers, in `config/weight_files.py`, before the first weight.
"""

import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_a3po.config import read_model_shape
from megatron_a3po.config.model import ModelSection
from megatron_a3po.config.weight_files import TensorHeader, listed, read_headers
from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import Table, table_of
from megatron_a3po.weights.operations import SliceReader

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A buffer that older checkpoints hold although config.json says it all.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
COMPARED_ROWS = 8192


class SafetensorsSource(Mapping[str, SliceReader]):
    """The tensors of a model from the shards of a Hugging Face directory, memory mapped; a tensor is read by slices.

    Errors: InputError where the directory does not hold exactly the tensors of `table`, see `check_tensors`.
    """

    def __init__(self, directory: Path, table: Table) -> None:
        headers = check_tensors(directory, table)
        if left_out := [name for name in headers if table.leaves_out(name)]:
            logger.warning(
                "%s: %s are left out, here and of what is written: layers that predict further tokens are no part of "
                "the policy",
                directory,
                listed(left_out),
            )
        elif unused := [name for name in headers if name not in table.tensors]:
            logger.info("not used of %s: %s", directory, listed(unused))
        self._headers = {name: headers[name] for name in table.tensors}
        self._opened = ExitStack()
        self._files = {
            file: self._opened.enter_context(_open(file))
            for file in {header.file for header in self._headers.values()}
        }

    def __getitem__(self, name: str) -> SliceReader:
        return self._files[self._headers[name].file].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def check_weights(model: ModelSection) -> None:
    """InputError where what a run would begin with is not its model's, see `check_tensors`. No device is touched."""
    if model.initialization == "pretrained":
        check_tensors(Path(model.hf_path), table_of(read_model_shape(model.hf_path)))


def check_tensors(directory: Path, table: Table) -> dict[str, TensorHeader]:
    """The headers of all tensors in a Hugging Face directory, once they are what `table` asks for.

    Errors: InputError with one sentence on what is missing or unknown, or has another size, or on a head that differs
    from the embedding it is said to be; and what `read_headers` refuses.
    """
    headers = read_headers(directory)
    missing = [name for name in table.tensors if name not in headers]
    unknown = [name for name in headers if name not in table.tensors and not _may_be_unused(name, table)]
    problems: list[str] = []
    if missing or unknown:
        lacks = [f"lacks {listed(missing)}"] if missing else []
        has = [f"has {listed(unknown)}, which is none of its tensors"] if unknown else []
        problems.append(
            f"{directory} is not the {table.shape.model_type} model that its config.json describes: it "
            f"{' and '.join(lacks + has)}; bring weights and config.json of the same model."
        )
    else:
        problems += _misshapen(headers, table) or _untied_head(headers, table)
    if problems:
        raise InputError(problems)
    return headers


def _may_be_unused(name: str, table: Table) -> bool:
    """A head that is the embedding, a buffer, or layers that predict further tokens."""
    return name == HEAD or COMPUTED.search(name) is not None or table.leaves_out(name)


def _misshapen(headers: Mapping[str, TensorHeader], table: Table) -> list[str]:
    others = [name for name, size in table.tensors.items() if headers[name].shape != size]
    if not others:
        return []
    name = others[0]
    more = f" (and so for {len(others) - 1} more)" if len(others) > 1 else ""
    return [
        f"{headers[name].file} has {name} of shape {headers[name].shape}, but config.json asks for "
        f"{table.tensors[name]}{more}; bring weights and config.json of the same model."
    ]


def _untied_head(headers: Mapping[str, TensorHeader], table: Table) -> list[str]:
    """Some checkpoints store a tied head once more, which is fine as long as it is the embedding."""
    if HEAD not in headers or HEAD in table.tensors:
        return []
    head, embedding = headers[HEAD], headers[EMBEDDING]
    with _open(head.file) as one, _open(embedding.file) as other:
        parts = (one.get_slice(HEAD), other.get_slice(EMBEDDING))
        starts = range(0, embedding.shape[0], COMPARED_ROWS)
        same = head.shape == embedding.shape and all(
            torch.equal(*(part[start : start + COMPARED_ROWS] for part in parts)) for start in starts
        )
    if same:
        return []
    return [
        f"{head.file} has a {HEAD} that differs from {EMBEDDING}, but config.json has tie_word_embeddings=true: "
        "set it to false to train both, or remove the tensor."
    ]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own untyped errors for damaged files
        raise InputError(
            f"{file} cannot be read as safetensors ({error}): copy or download it again."
        ) from None


class RandomSource(Mapping[str, SliceReader]):
    """Random weights of a model, every full tensor from (seed, its name): the same start in every layout."""

    def __init__(self, table: Table, seed: int) -> None:
        self._shapes, self._seed = table.tensors, seed
        self._std = table.shape.initializer_range
        self._norm = torch.zeros if table.shape.zero_centered_norms else torch.ones

    def __getitem__(self, name: str) -> Tensor:
        size = self._shapes[name]
        if name.endswith("bias"):
            return torch.zeros(size)
        if "norm" in name:
            return self._norm(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(size, generator=generator) * self._std

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
