"""Distributed checkpoints of the weights: a real actor loads what is written without one, and the other way round."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_a3po.actor import checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config import read_model_shape
from megatron_a3po.errors import InputError
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.manifest import damage
from megatron_a3po.weights.megatron_checkpoint import Ranks, check_layout, write_megatron_checkpoint
from megatron_a3po.weights.megatron_reader import MegatronReader
from megatron_a3po.weights.sources import SafetensorsSource
from tests.actor.ranks import on_actors, random_sequences
from tests.actor.replay import VOCAB_SIZE

# Megatron-Core 0.19's own call of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
]

LAYOUTS: dict[str, Any] = {
    "one rank": {},
    "tp 2 pp 2": {"tp": 2, "pp": 2},
    "pp 2 interleaved": {"pp": 2, "virtual_pipeline_model_parallel_size": 2},
}


def converted(model: Path, directory: Path, ranks: Ranks, **keys: Any) -> Path:
    shape = read_model_shape(model)
    tp_size = ranks.tensor_model_parallel_size
    write_megatron_checkpoint(
        SafetensorsSource(model, table_of(shape)),
        table_of(shape),
        directory,
        template=model,
        ranks=ranks,
        padded_vocab_size=-(-shape.vocab_size // (4 * tp_size)) * 4 * tp_size,
        **keys,
    )
    return directory


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in model.glob("*.safetensors") for name, one in load_file(file).items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("embedding", ["model", "tied_model"])
def test_an_actor_loads_what_was_written_without_one(
    request: pytest.FixtureRequest, tmp_path: Path, embedding: str, layout: str
):
    model: Path = request.getfixturevalue(embedding)
    written = converted(model, tmp_path / "megatron", Ranks(2, 2))

    def load(actor: Actor) -> None:
        checkpoint.load_weights(actor.model, written)
        actor.write_hugging_face(tmp_path / "export")

    on_actors(load, model, initialization="random", **LAYOUTS[layout])
    assert differing(tensors_of(tmp_path / "export"), tensors_of(model)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("embedding", ["model", "tied_model"])
def test_what_an_actor_in_training_saves_is_read_without_one(
    request: pytest.FixtureRequest, tmp_path: Path, embedding: str, layout: str
):
    model: Path = request.getfixturevalue(embedding)

    def save(actor: Actor) -> None:
        actor.start_stage(Schedule(1e-3, 0.0, 0, "constant", 10))
        actor.update(actor.pack(random_sequences([9, 5, 7], VOCAB_SIZE)), supervised_objective)
        checkpoint.save(actor, saved)
        actor.write_hugging_face(tmp_path / "export")

    saved = tmp_path / "step-3" / "actor"
    saved.mkdir(parents=True)
    on_actors(save, model, **LAYOUTS[layout])
    reader = MegatronReader(tmp_path / "step-3")
    assert reader.optimizer_tensors
    found = dict(reader.hugging_face_tensors())
    assert [(one.name, one.shape) for one in reader.announced()] == [
        (name, tuple(tensor.shape)) for name, tensor in found.items()
    ]
    trained = tensors_of(tmp_path / "export")
    assert differing(found, trained) == []
    assert len(differing(trained, tensors_of(model))) == len(trained)  # the step changed every tensor


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(2, 1), Ranks(2, 4)], ids=str)
def test_one_file_a_rank_holds_its_shards_and_gives_them_back(model: Path, tmp_path: Path, ranks: Ranks):
    written = converted(model, tmp_path / "out", ranks)
    files = sorted(written.glob("*.distcp"))
    assert [file.name for file in files] == [f"__{rank}_0.distcp" for rank in range(ranks.world_size)]
    reader = MegatronReader(written)
    assert differing(dict(reader.hugging_face_tensors()), tensors_of(model)) == []
    qkv = reader.tensors["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert len(qkv.chunks) == ranks.tensor_model_parallel_size
    gate_up = reader.tensors["decoder.layers.0.mlp.linear_fc1.weight"]
    assert len(gate_up.chunks) == {1: 1, 2: 4}[ranks.tensor_model_parallel_size]
    assert reader.layout["pipeline_model_parallel_size"] == ranks.pipeline_model_parallel_size
    assert damage(written, 1) is None


def test_the_padding_of_the_vocabulary_is_zeros_and_stays_in_the_checkpoint(model: Path, tmp_path: Path):
    reader = MegatronReader(converted(model, tmp_path / "out", Ranks(2, 1)))
    source, found = tensors_of(model), dict(reader.hugging_face_tensors())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        (hf_name,) = reader.table.parameter(name).tensors
        padded = reader.read(reader.table.parameter(name))
        assert padded.shape[0] == reader.tensors[name].size[0] > VOCAB_SIZE
        assert torch.equal(padded[:VOCAB_SIZE], source[hf_name])
        assert not padded[VOCAB_SIZE:].any()
        assert torch.equal(found[hf_name], source[hf_name])


def test_another_precision_is_the_nearest(model: Path, tmp_path: Path):
    reader = MegatronReader(converted(model, tmp_path / "out", Ranks(2, 2), dtype=torch.bfloat16))
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(model).items()}
    assert differing(dict(reader.hugging_face_tensors()), expected) == []
    assert {one.dtype for one in reader.announced()} == {torch.bfloat16}
    in_full = dict(reader.hugging_face_tensors(torch.float32))
    assert differing(in_full, {name: tensor.float() for name, tensor in expected.items()}) == []


def large(model: Path, folder: Path, name: str) -> Path:
    """A copy in which one number of a tensor is beyond float16, and another is infinite already."""
    shutil.copytree(model, folder)
    tensors = tensors_of(folder)
    tensors[name].view(-1)[[3, 5]] = torch.tensor([-1e6, torch.inf])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_number_too_large_for_a_precision_is_refused_both_ways(model: Path, tmp_path: Path, name: str):
    source, out = large(model, tmp_path / "large", name), tmp_path / "out"
    says = rf"{name}: the largest number is 1e\+06, but float16 ends at 6\.55e\+04: take bfloat16"
    with pytest.raises(InputError, match=says):
        converted(source, out, Ranks(2, 2), dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    reader = MegatronReader(converted(source, out, Ranks(2, 2)))
    with pytest.raises(InputError, match=f"^{says}"):
        list(reader.hugging_face_tensors(torch.float16))
    expected = {key: tensor.bfloat16() for key, tensor in tensors_of(source).items()}
    assert differing(dict(reader.hugging_face_tensors(torch.bfloat16)), expected) == []


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (Ranks(1, 3), "--pipeline-model-parallel-size is 3, which does not divide the 4 layers"),
        # Twice as many as key-value heads, whose rows could be divided.
        (
            Ranks(4, 1),
            "--tensor-model-parallel-size is 4, which does not divide the 2 key-value heads of the",
        ),
        (Ranks(1, 1, 2), "--expert-model-parallel-size is 2, but this qwen2 has no experts"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused(model: Path, tmp_path: Path, ranks: Ranks, says: str):
    with pytest.raises(InputError, match=says):
        converted(model, tmp_path / "out", ranks)
    assert list(tmp_path.iterdir()) == []


def test_columns_that_cannot_be_divided_are_named(model: Path):
    table = table_of(replace(read_model_shape(model), ffn_hidden_size=95))
    with pytest.raises(
        InputError, match=r"size is 2, which does not divide model\.layers\.0\.mlp\.gate_proj"
    ):
        check_layout(table, Ranks(2, 1), padded_vocab_size=VOCAB_SIZE + 1)


def test_one_parameter_of_several_precisions_is_refused_or_made_one(model: Path, tmp_path: Path):
    mixed = Path(shutil.copytree(model, tmp_path / "mixed"))
    tensors, name = tensors_of(mixed), "model.layers.1.self_attn.k_proj.weight"
    save_file(
        tensors | {name: tensors[name].bfloat16()}, mixed / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        InputError, match=rf"q_proj\.weight is torch.float32 and {name} is torch.bfloat16.*say with --dtype"
    ):
        converted(mixed, tmp_path / "out", Ranks())
    assert not (tmp_path / "out").exists()
    reader = MegatronReader(converted(mixed, tmp_path / "out", Ranks(), dtype=torch.float32))
    assert differing(dict(reader.hugging_face_tensors()), tensors) == []  # bfloat16 holds these weights


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def garbled(file: Path) -> None:
    file.write_bytes(b"\x80\x02}q\x00" * (file.stat().st_size // 5 + 1))


@pytest.mark.parametrize("damaged", [cut_short, zeroed, garbled, Path.unlink])
def test_a_damaged_file_is_named(model: Path, tmp_path: Path, damaged: Callable[[Path], None]):
    written = converted(model, tmp_path / "out", Ranks(1, 2))
    damaged(written / "__1_0.distcp")

    def load(actor: Actor) -> list[str]:
        with pytest.raises(InputError) as caught:
            checkpoint.load_weights(actor.model, written)
        return caught.value.problems

    with pytest.raises(InputError, match=r"out/__1_0\.distcp: decoder\.\S+ cannot be read \(.+\)") as caught:
        list(MegatronReader(written).hugging_face_tensors())
    said = [*caught.value.problems, *on_actors(load, model, tp=2, initialization="random")[1]]
    assert len(said) == 2
    assert str(written) in said[1]
    assert not [one for one in said if "\n" in one or "weights_only" in one]


def test_contents_that_do_not_say_what_lies_where(model: Path, tmp_path: Path):
    written = converted(model, tmp_path / "out", Ranks())
    metadata = MegatronReader(written).metadata
    assert metadata.storage_data is not None
    places = {
        index: one
        for index, one in metadata.storage_data.items()
        if index.fqn != "decoder.final_layernorm.weight"
    }
    (written / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=places)))
    with pytest.raises(InputError, match=r"\.metadata: decoder\.final_layernorm\.weight cannot be read"):
        list(MegatronReader(written).hugging_face_tensors())
    final_norm: Any = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    final_norm.chunks.clear()
    (written / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"\.metadata says where 0 of the 64 numbers of decoder\.final"):
        list(MegatronReader(written).hugging_face_tensors())
    (written / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=None)))
    with pytest.raises(InputError, match=r"\.metadata is not loaded.*does not say which tensors lie where"):
        MegatronReader(written)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"], ids=str)
def test_a_damaged_layout_is_named(model: Path, tmp_path: Path, content: bytes):
    written = converted(model, tmp_path / "out", Ranks())
    (written / "layout.json").write_bytes(content)
    with pytest.raises(InputError, match=r"layout\.json is no JSON object"):
        _ = MegatronReader(written).layout


def test_a_tensor_too_many_and_one_too_few_are_named(model: Path, tied_model: Path, tmp_path: Path):
    untied = converted(model, tmp_path / "untied", Ranks())
    tied = converted(tied_model, tmp_path / "tied", Ranks())
    for one, other in ((untied, tied), (tied, untied)):
        config = json.loads((other / "hugging_face" / "config.json").read_text())
        (one / "hugging_face" / "config.json").write_text(
            json.dumps(config | {"tie_word_embeddings": one == untied})
        )
    with pytest.raises(InputError, match=r"holds the tensor output_layer\.weight, which no qwen2"):
        MegatronReader(untied).announced()
    with pytest.raises(InputError, match=r"lacks the tensor output_layer\.weight"):
        MegatronReader(tied).announced()


def reconfigured(checkpoint: Path, **changes: Any) -> MegatronReader:
    """As if another model's config.json lay with it."""
    file = checkpoint / "hugging_face" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return MegatronReader(checkpoint)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"vocab_size": VOCAB_SIZE + 10},
            r"word_embeddings\.weight of shape \(152, 64\).*asks for \(161, 64\)",
        ),
        ({"num_key_value_heads": 4}, r"0\.\S+linear_qkv\.weight of shape \(128, 64\).*asks for \(192, 64\)"),
        ({"intermediate_size": 48}, r"0\.mlp\.linear_fc1\.weight of shape \(192, 64\).*asks for \(96, 64\)"),
    ],
    ids=str,
)
def test_a_tensor_of_another_size_is_named(model: Path, tmp_path: Path, changes: dict[str, Any], says: str):
    reader = reconfigured(converted(model, tmp_path / "out", Ranks()), **changes)
    for read in (reader.announced, lambda: list(reader.hugging_face_tensors())):
        with pytest.raises(InputError, match=says):
            read()


def test_rows_of_the_vocabulary_that_are_no_padding_are_never_cut_off(model: Path, tmp_path: Path):
    reader = reconfigured(converted(model, tmp_path / "out", Ranks(2, 1)), vocab_size=VOCAB_SIZE - 51)
    with pytest.raises(
        InputError, match=r"embeddings\.weight for 152 tokens, but config.json has vocab_size=100"
    ):
        list(reader.hugging_face_tensors())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no distributed checkpoint of Megatron-Core"):
        MegatronReader(tmp_path)
