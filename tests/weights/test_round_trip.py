"""Hugging Face to Megatron-Core's shards and back keeps every bit, in every layout."""

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config.model import ModelSection
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from megatron_a3po.weights.operations import SliceReader
from megatron_a3po.weights.sources import SafetensorsSource
from tests.actor.ranks import on_actors, random_sequences
from tests.actor.replay import VOCAB_SIZE
from tests.distributed.ranks import RanksFailed
from tests.weights.checkpoints import COMMON, write_checkpoint

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


@pytest.mark.parametrize("embedding", ["model", "tied_model"])
def test_rows_that_pad_the_vocabulary_are_zeros_and_are_never_trained(
    request: pytest.FixtureRequest, tmp_path: Path, embedding: str
):
    """151 tokens on two tensor ranks of 80 rows: the second has 9 that are no tokens."""
    model: Path = request.getfixturevalue(embedding)

    def train(actor: Actor) -> list[torch.Tensor]:
        found = []
        actor.start_stage(Schedule(1e-2, 0.0, 0, "constant", 10))
        for _ in range(2):
            found += [one.clone() for _, one in vocabulary_shards(actor)]
            actor.update(actor.pack(random_sequences([9, 30, 17], VOCAB_SIZE)), supervised_objective)
        actor.write_hugging_face(tmp_path / "export")
        return [*found, *(one.clone() for _, one in vocabulary_shards(actor))]

    first, second = on_actors(train, model, tp=2, make_vocab_size_divisible_by=16)
    assert len(first) == len(second) == (6 if embedding == "model" else 3)
    for lower, upper in zip(first, second, strict=True):
        assert len(lower) == len(upper) == 80
        assert upper[70].any()
        assert not upper[71:].any()
    trained = tensors_of(tmp_path / "export")
    head = "lm_head.weight" if embedding == "model" else "model.embed_tokens.weight"
    assert torch.equal(trained[head], torch.cat([first[-1], second[-1]])[:VOCAB_SIZE])
    assert not torch.equal(trained[head], tensors_of(model)[head])


def vocabulary_shards(actor: Actor) -> list[tuple[str, torch.Tensor]]:
    return [(name, one) for name, one in actor.shards() if "embedding" in name or "output_layer" in name]


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


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class WatchedSource(SafetensorsSource):
    """Looks at this process's memory whenever a tensor is asked for: all that is held of those before it is seen."""

    held: ClassVar[list[int]] = []

    def __getitem__(self, name: str) -> SliceReader:
        self.held.append(anonymous_bytes())
        return super().__getitem__(name)


def test_a_rank_loads_with_a_few_tensors_besides_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = Qwen2Config(**{**COMMON, "num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 1024})
    source = write_checkpoint(tmp_path / "hf", config)
    monkeypatch.setattr("megatron_a3po.actor.actor.SafetensorsSource", WatchedSource)

    def load_again(actor: Actor) -> tuple[int, int]:
        """Into weights whose pages are there already: (bytes at most beyond them, their size)."""
        WatchedSource.held.clear()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and would be used again, unseen
        before = anonymous_bytes()
        actor._load(ModelSection(hf_path=str(source)), seed=1)
        return max(WatchedSource.held) - before, sum(one.nbytes for _, one in actor.shards())

    for beyond, size in on_actors(load_again, source, tp=2):
        print(f"{beyond / size:.3f} of the {size / 1e6:.0f} MB of a rank")
        assert size > 40e6
        assert beyond < 0.3 * size


def test_a_replica_that_drifted_is_never_written(model: Path, tmp_path: Path):
    def drift_and_export(actor: Actor) -> None:
        norm = next(parameter for name, parameter, _ in actor._parameters() if "norm" in name)
        norm.data[0] += actor.grid.tp.rank
        actor.write_hugging_face(tmp_path / "export")

    with pytest.raises(RanksFailed, match="differs between tensor ranks 0 and 1"):
        on_actors(drift_and_export, model, tp=2)
    assert not (tmp_path / "export").exists()
