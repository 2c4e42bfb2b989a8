"""Hugging Face to Megatron-Core's shards and back keeps every bit, in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_a3po.actor.actor import Actor
from tests.actor.ranks import on_actors
from tests.distributed.ranks import RanksFailed

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp 2": {"tp": 2},
    "tp 2 pp 2": {"tp": 2, "pp": 2},
    "pp 2 interleaved": {"pp": 2, "virtual_pipeline_model_parallel_size": 2},
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    found = [load_file(file) for file in files]
    assert sum(map(len, found)) == len(set().union(*found)), "a tensor is in two files"
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


def exported(model: Path, directory: Path, **keys: Any) -> dict[str, torch.Tensor]:
    """What actors write that have just loaded `model`."""

    def export(actor: Actor) -> None:
        actor.write_hugging_face(directory, with_tokenizer=True)

    on_actors(export, model, **keys)
    return tensors_of(directory)


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("embedding", ["model", "tied_model"])
def test_what_was_loaded_is_written_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, embedding: str, layout: str
):
    model: Path = request.getfixturevalue(embedding)
    found = exported(model, tmp_path / "export", **LAYOUTS[layout])
    assert_identical(found, tensors_of(model))
    assert ("lm_head.weight" in found) == (embedding == "model")


def test_transformers_loads_what_is_written(model: Path, tmp_path: Path):
    exported(model, tmp_path / "export", tp=2, pp=2)
    one, other = (
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        for path in (model, tmp_path / "export")
    )
    assert_identical(other.state_dict(), one.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    assert tokenizer.decode(tokenizer.encode("12+34=46")) == "12+34=46"


def test_random_weights_start_alike_in_every_layout(model: Path, tmp_path: Path):
    starts = [
        exported(model, tmp_path / name, initialization="random", **keys) for name, keys in LAYOUTS.items()
    ]
    for start in starts[1:]:
        assert_identical(start, starts[0])
    assert starts[0].keys() == tensors_of(model).keys()
    assert starts[0]["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_bfloat16_weights_come_back_bit_for_bit(model: Path, tmp_path: Path):
    half = {name: tensor.bfloat16() for name, tensor in tensors_of(model).items()}
    folder = tmp_path / "half"
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    assert_identical(exported(folder, tmp_path / "export", tp=2, bf16=True), half)


def test_a_replica_that_drifted_is_never_written(model: Path, tmp_path: Path):
    def drift_and_export(actor: Actor) -> None:
        norm = next(parameter for name, parameter, _ in actor._parameters() if "norm" in name)
        norm.data[0] += actor.grid.tp.rank
        actor.write_hugging_face(tmp_path / "export")

    with pytest.raises(RanksFailed, match="differs between tensor ranks 0 and 1"):
        on_actors(drift_and_export, model, tp=2)
    assert not (tmp_path / "export").exists()
