"""What the headers of weight files say, and the sentence for each way in which the files can be wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_a3po.config.weight_files import read_headers, weight_files
from megatron_a3po.errors import InputError
from tests.safetensors_files import safetensors_bytes, write_shards

A = {"a": ("F32", (4, 2))}
B = {"b": ("BF16", (3,))}
INDEX = {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good shards and their index."""
    return write_shards(tmp_path / "model", {"one.safetensors": A, "two.safetensors": B}, INDEX)


def test_headers_are_those_safetensors_writes(tmp_path: Path):
    tensors = {"x": torch.zeros(3, 5), "y": torch.zeros(2, dtype=torch.bfloat16), "z": torch.zeros(())}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    headers = read_headers(tmp_path)
    assert {name: (header.dtype, header.shape) for name, header in headers.items()} == {
        "x": ("F32", (3, 5)),
        "y": ("BF16", (2,)),
        "z": ("F32", ()),
    }


def test_which_files_are_the_models(folder: Path):
    (folder / "consolidated.safetensors").write_bytes(b"another format's, beside the index")
    assert [file.name for file in weight_files(folder)] == ["one.safetensors", "two.safetensors"]
    assert set(read_headers(folder)) == {"a", "b"}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "consolidated.safetensors").unlink()
    assert set(read_headers(folder)) == {"a", "b"}
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"c": ("F32", ())}))
    assert set(read_headers(folder)) == {"c"}


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: keep(len(content))])

    return damage


def rewrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def reindex(text: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(text))


DAMAGES = {
    "missing": (
        lambda folder: (folder / "two.safetensors").unlink(),
        "names two.safetensors, which is missing",
    ),
    "data cut": (
        cut("two.safetensors", lambda size: size - 1),
        r"two.safetensors is cut short \(\d+ bytes instead",
    ),
    "header cut": (cut("two.safetensors", lambda size: 20), "two.safetensors is cut short"),
    "empty": (cut("two.safetensors", lambda size: 0), "two.safetensors is no safetensors file"),
    "longer": (
        rewrite("two.safetensors", safetensors_bytes(B) + b"x"),
        "two.safetensors is longer than its header says",
    ),
    "another format": (rewrite("two.safetensors", b"PK" * 99), "two.safetensors is no safetensors file"),
    "no header": (
        rewrite("two.safetensors", b"\x04" + bytes(7) + b"[{}]"),
        "two.safetensors is no safetensors file",
    ),
    "pointer": (
        rewrite("two.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "two.safetensors is a Git LFS pointer.*git lfs pull",
    ),
    "twice": (
        rewrite("two.safetensors", safetensors_bytes({**A, **B})),
        "a lies in .*one.safetensors and in .*two.safetensors",
    ),
    "not held": (
        reindex({"weight_map": {**INDEX, "c": "two.safetensors"}}),
        "says that c lies in two.safetensors, which does not hold it",
    ),
    "in another file": (
        reindex({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}),
        "says that a lies in two.safetensors, which does not",
    ),
    "index": (reindex({"metadata": {}}), "model.safetensors.index.json is no index"),
    "index of lists": (reindex({"weight_map": [1]}), "model.safetensors.index.json is no index"),
    "both": (rewrite("model.safetensors", safetensors_bytes(A)), "has both model.safetensors and"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files(folder: Path, damage: Callable[[Path], object], says: str):
    damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        read_headers(folder)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].endswith(".")


def test_every_damaged_file_is_named(folder: Path):
    for name in ("one.safetensors", "two.safetensors"):
        cut(name, lambda size: size - 1)(folder)
    with pytest.raises(InputError) as caught:
        read_headers(folder)
    assert ["one" in problem for problem in caught.value.problems] == [True, False]


def test_pickled_weights_are_never_opened(tmp_path: Path):
    for number in range(1, 6):
        # Opening a pipe without a writer would wait for ever.
        os.mkfifo(tmp_path / f"pytorch_model-{number:05d}-of-00005.bin")
    with pytest.raises(InputError) as caught:
        read_headers(tmp_path)
    (problem,) = caught.value.problems
    assert "pytorch_model-00001-of-00005.bin" in problem
    assert "and 2 more" in problem
    assert "save_pretrained" in problem
    assert "if you trust" in problem


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"a": 5}}, "a in weight_map is 5, but must be the name of a file"),
        ({"weight_map": {"a": ["one.safetensors"]}}, 'a in weight_map is ["one.safetensors"], but must be'),
        ({"weight_map": ["a"]}, 'weight_map is ["a"], but must be a mapping from tensors to files'),
        ({}, "weight_map is null, but must be a mapping"),
        ([], "holds no JSON object"),
    ],
    ids=str,
)
def test_an_index_that_names_no_files(folder: Path, index: object, sentence: str):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        read_headers(folder)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder}/model.safetensors.index.json")
    assert sentence in problem


def test_a_weight_file_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to("/proc/self/mem")  # a file whose reading fails, for root too
    with pytest.raises(InputError, match=r"model\.safetensors is not readable \(Input/output error\)"):
        read_headers(tmp_path)
