"""Where full tensors by Hugging Face name come from: safetensors files, or one seed."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_a3po.config import ModelShape
from megatron_a3po.errors import InputError
from megatron_a3po.weights.operations import SliceReader


class SafetensorsSource(Mapping[str, SliceReader]):
    """The safetensors shards of a Hugging Face directory, memory mapped; a tensor is read by slices."""

    def __init__(self, directory: Path) -> None:
        self._files = ExitStack()
        self._readers: dict[str, SliceReader] = {}
        for path in safetensors_files(directory):
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # safetensors raises its own untyped errors for damaged files
                raise InputError(
                    f"{path} cannot be read as safetensors ({error}); copy or download it again"
                ) from None
            self._readers |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> SliceReader:
        return self._readers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def safetensors_files(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, by its index where it has one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [
            directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{index} names {', '.join(missing)}, which is missing; copy it beside the index")
    if not files:
        raise InputError(
            f"{directory} holds no .safetensors file; point model.hf_path at a Hugging Face checkpoint in safetensors "
            "format, or start from random weights with model.initialization=random"
        )
    return files


class RandomSource(Mapping[str, SliceReader]):
    """Random weights of a shape, every full tensor from (seed, its name): the same start in every layout."""

    def __init__(self, names: Mapping[str, tuple[int, ...]], shape: ModelShape, seed: int) -> None:
        self._shapes, self._std, self._seed = names, shape.initializer_range, seed

    def __getitem__(self, name: str) -> Tensor:
        size = self._shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(size)
        if "norm" in name:
            return torch.ones(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(size, generator=generator) * self._std

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names and sizes of a dense decoder of this shape."""
    hidden, ffn, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    query = shape.num_attention_heads * shape.head_dim
    key_value = shape.num_query_groups * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tie_word_embeddings:
        sizes["lm_head.weight"] = (vocab, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for part, width in (("q", query), ("k", key_value), ("v", key_value)):
            sizes[f"{prefix}self_attn.{part}_proj.weight"] = (width, hidden)
            if shape.add_qkv_bias:
                sizes[f"{prefix}self_attn.{part}_proj.bias"] = (width,)
        sizes[f"{prefix}self_attn.o_proj.weight"] = (hidden, query)
        sizes[f"{prefix}mlp.gate_proj.weight"] = sizes[f"{prefix}mlp.up_proj.weight"] = (ffn, hidden)
        sizes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{prefix}{norm}.weight"] = (hidden,)
    return sizes
