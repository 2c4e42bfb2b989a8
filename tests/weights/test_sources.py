"""Where weights come from, and the sentences about what is wrong with them; where versions go, and which are kept."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_a3po.config import read_model_shape
from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.operations import Layout
from megatron_a3po.weights.publishing import forget_old_versions, version_directory
from megatron_a3po.weights.shards import load_shards
from megatron_a3po.weights.sources import RandomSource, SafetensorsSource

NORM = ("decoder.final_layernorm.weight", "model.norm.weight")


def test_the_table_of_sizes_is_transformers(model: Path, tied_model: Path):
    for folder in (model, tied_model):
        found = {
            name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()
        }
        assert table_of(read_model_shape(folder)).tensors == found


def test_a_tensor_is_read_by_slices(model: Path):
    source = SafetensorsSource(model, table_of(read_model_shape(model)))
    name = "model.embed_tokens.weight"
    assert torch.equal(source[name][3:7], load_file(model / "model.safetensors")[name][3:7])
    assert len(source) == len(set(source)) == len(table_of(read_model_shape(model)).tensors)


def test_random_weights_are_a_function_of_seed_and_name(model: Path):
    table = table_of(read_model_shape(model))
    one, same, other = (RandomSource(table, seed) for seed in (1, 1, 2))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("0", "1")])
    assert (one["model.norm.weight"] == 1).all()
    assert set(one) == set(table.tensors)


Tensors = dict[str, torch.Tensor]


def lay_down(source: Path, folder: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    """A copy of a model with other tensors or another config.json."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refused(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        SafetensorsSource(folder, table_of(read_model_shape(folder)))
    return caught.value.problems


def add(name: str, *size: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(size)})


def resize(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


NORM_0, K_PROJ = "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"
WRONG = {
    "missing": (lambda tensors: tensors.pop(NORM_0), {}, f"it lacks {NORM_0}; bring"),
    "unknown": (
        add("model.layers.0.mlp.experts.0.up_proj.weight", 2),
        {},
        "experts.0.up_proj.weight, which is none",
    ),
    "shape": (resize(K_PROJ), {}, f"model.safetensors has {K_PROJ} of shape"),
    "vocabulary": (resize("lm_head.weight"), {}, "model.safetensors has lm_head.weight of shape"),
    "no head": (lambda tensors: tensors.pop("lm_head.weight"), {}, "it lacks lm_head.weight"),
    "another head": (
        lambda tensors: None,
        {"tie_word_embeddings": True},
        "has a lm_head.weight that differs",
    ),
    "fewer layers": (
        lambda tensors: None,
        {"num_hidden_layers": 1, "layer_types": None},
        "model.layers.1.*and .* more, which is none",
    ),
    "another family": (
        lambda tensors: None,
        {"model_type": "qwen3"},
        "is not the qwen3 model.*it lacks .*q_norm.* and has .*q_proj.bias",
    ),
    "quantised": (
        lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(torch.float8_e4m3fn)}),
        {},
        f"has {K_PROJ} as F8_E4M3, but only",
    ),
}


@pytest.mark.parametrize(("change", "config", "says"), WRONG.values(), ids=WRONG)
def test_tensors_that_are_not_the_models(model: Path, tmp_path: Path, change, config: dict, says: str):
    folder = lay_down(model, tmp_path / "other", change, **config)
    (problem,) = refused(folder)
    assert re.search(says, problem)
    assert str(folder) in problem
    assert problem.endswith(".")


def test_tensors_a_model_can_do_without(tied_model: Path, tmp_path: Path):
    """What older checkpoints hold besides, and a tied head that is stored once more."""

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = lay_down(tied_model, tmp_path / "other", change)
    table = table_of(read_model_shape(folder))
    assert set(SafetensorsSource(folder, table)) == set(table.tensors)


def test_a_header_safetensors_does_not_take(model: Path, tmp_path: Path):
    folder = lay_down(model, tmp_path / "other", lambda tensors: None)
    file = folder / "model.safetensors"
    # Of the right length and with the right shapes, but two tensors share their place.
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name in ("model.layers.0", "model.layers.1"):
        header[f"{name}.input_layernorm.weight"]["data_offsets"] = [0, 4]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(content[:8] + text[:length] + content[8 + length :])
    (problem,) = refused(folder)
    assert "model.safetensors cannot be read as safetensors" in problem


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({}, "lacks the tensor model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, "model.norm.weight make a shard of shape"),
    ],
    ids=["missing", "misshapen"],
)
def test_a_tensor_the_model_needs_must_fit(model: Path, held: dict[str, torch.Tensor], says: str):
    shape = read_model_shape(str(model))
    layout = Layout(shape, shape.vocab_size, 0, 1)
    with pytest.raises(InputError, match=says):
        load_shards([(NORM[0], torch.zeros(shape.hidden_size))], held, table_of(shape), layout)


def test_a_number_too_large_for_the_parameters_is_refused(model: Path):
    shape = read_model_shape(str(model))
    layout = Layout(shape, shape.vocab_size, 0, 1)
    held = {NORM[1]: torch.ones(shape.hidden_size)}
    held[NORM[1]][3] = 3.4e38  # float32 ends at 3.403e38
    with pytest.raises(
        InputError, match=r"^model\.norm\.weight: the largest number is 3\.4e\+38, but bfloat16"
    ):
        load_shards([(NORM[0], torch.zeros_like(held[NORM[1]]).bfloat16())], held, table_of(shape), layout)
    load_shards([(NORM[0], whole := torch.zeros_like(held[NORM[1]]))], held, table_of(shape), layout)
    assert torch.equal(whole, held[NORM[1]])


def test_the_newest_versions_are_kept(tmp_path: Path):
    for version in (0, 2, 9, 10, 11):
        version_directory(tmp_path, version).mkdir()
    (tmp_path / "version-12.tmp").mkdir()  # being written
    forget_old_versions(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-10", "version-11", "version-12.tmp"]
