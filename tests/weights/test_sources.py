"""Where weights come from, and the sentences about what is wrong with them; where versions go, and which are kept."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_a3po.config import read_model_shape
from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.operations import Layout
from megatron_a3po.weights.publishing import forget_old_versions, version_directory
from megatron_a3po.weights.shards import load_shards
from megatron_a3po.weights.sources import RandomSource, SafetensorsSource, safetensors_files

NORM = ("decoder.final_layernorm.weight", "model.norm.weight")


def test_the_table_of_sizes_is_transformers(model: Path, tied_model: Path):
    for folder in (model, tied_model):
        found = {
            name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()
        }
        assert table_of(read_model_shape(folder)).tensors == found


def test_a_tensor_is_read_by_slices(model: Path):
    source = SafetensorsSource(model)
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


def test_a_folder_without_weights_is_named_with_the_ways_on(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"no \.safetensors file.*model\.hf_path.*model\.initialization=random"
    ):
        safetensors_files(tmp_path)


def test_a_file_the_index_names_must_be_there(tmp_path: Path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    with pytest.raises(InputError, match=r"model-2\.safetensors, which is missing"):
        safetensors_files(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    assert set(SafetensorsSource(tmp_path)) == {"a", "b"}


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
        SafetensorsSource(tmp_path)


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


def test_the_newest_versions_are_kept(tmp_path: Path):
    for version in (0, 2, 9, 10, 11):
        version_directory(tmp_path, version).mkdir()
    (tmp_path / "version-12.tmp").mkdir()  # being written
    forget_old_versions(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-10", "version-11", "version-12.tmp"]
