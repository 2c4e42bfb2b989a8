"""Two checkpoints on one prompt: files of other names, older names of tensors, damage, and prompts that do not fit."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_a3po.actor.compare import Comparison, compare
from megatron_a3po.config import read_model_shape
from megatron_a3po.errors import InputError
from megatron_a3po.rollout.tokenizer import load_tokenizer
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.megatron_checkpoint import Ranks, write_megatron_checkpoint
from megatron_a3po.weights.megatron_reader import MegatronReader
from megatron_a3po.weights.sources import SafetensorsSource
from tests.actor.replay import VOCAB_SIZE
from tests.distributed.ranks import run_ranks

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def compared(a: Path, b: Path, prompt: str | None = None) -> Comparison:
    """In a process of its own: a process group is joined."""

    def on_rank(rank: int, world_size: int) -> Comparison:
        return compare(a, b, lambda folder, text: load_tokenizer(folder).encode(text), prompt=prompt)

    return run_ranks(on_rank, 1, joined=False)[0]


def refused(a: Path, b: Path, prompt: str | None = None, encode: Any = None) -> str:
    def on_rank(rank: int, world_size: int) -> str:
        with pytest.raises(InputError) as caught:
            compare(a, b, encode or (lambda folder, text: load_tokenizer(folder).encode(text)), prompt=prompt)
        return str(caught.value)

    return run_ranks(on_rank, 1, joined=False)[0]


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For TP 2, with a padded vocabulary."""
    table = table_of(read_model_shape(model))
    directory = tmp_path_factory.mktemp("compare") / "megatron"
    write_megatron_checkpoint(
        SafetensorsSource(model, table),
        table,
        directory,
        template=model,
        ranks=Ranks(2, 1),
        padded_vocab_size=VOCAB_SIZE + 1,
    )
    return directory


def plain(names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms by the names they have without Transformer Engine."""
    renamed = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }

    def name(old: str) -> str:
        for fused, own in renamed.items():
            old = old.replace(fused, own)
        return old

    return {name(old): tensor for old, tensor in names.items()}


def stacked(names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All layers of a parameter in one tensor."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name in sorted(names, key=lambda name: int((LAYER.match(name) or [0, -1])[1])):
        layers.setdefault(LAYER.sub("decoder.layers.", name), []).append(names[name])
    return {
        name: torch.stack(tensors) if name.startswith("decoder.layers.") else tensors[0]
        for name, tensors in layers.items()
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("renamed", [plain, stacked, lambda names: stacked(plain(names))])
def test_names_of_other_versions_are_read_and_computed(
    model: Path, converted: Path, tmp_path: Path, renamed: Callable[[Any], dict[str, torch.Tensor]]
):
    reader = MegatronReader(converted)
    names = {one.fused_name: reader.read(one) for one in reader.table.parameters}
    other = renamed(names)
    assert other.keys() != names.keys()
    save(other, storage_writer=FileSystemWriter(tmp_path / "other"), no_dist=True)
    shutil.copytree(reader.template, tmp_path / "other" / "hugging_face")
    found = dict(MegatronReader(tmp_path / "other").hugging_face_tensors())
    expected = load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert compared(model, tmp_path / "other").equal


def test_weights_by_another_file_name_and_never_a_pickle(model: Path, converted: Path, tmp_path: Path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "model.safetensors").rename(other / "weights.safetensors")
    (other / "pytorch_model.bin").write_bytes(b"no pickle")
    found = compared(other, converted)
    assert found.equal
    tensors = load_file(other / "weights.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "weights.safetensors", metadata={"format": "pt"})
    assert compared(other, converted).first_divergence == "layer 2 MLP"


def test_a_damaged_file_is_a_sentence(model: Path, converted: Path, tmp_path: Path):
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    (damaged / "__1_0.distcp").write_bytes(bytes(50_000))
    assert re.search(r"damaged/__1_0\.distcp: \S+ cannot be read", refused(model, damaged))


def test_a_prompt_that_cannot_be_computed_is_refused(model: Path, converted: Path):
    assert "--prompt is no token" in refused(model, converted, prompt="")
    beyond = refused(model, converted, encode=lambda folder, text: [*range(20), VOCAB_SIZE])
    assert (
        f"makes the token {VOCAB_SIZE} of the prompt, but config.json has vocab_size={VOCAB_SIZE}" in beyond
    )


def test_tokens_that_are_made_up_are_said_to_be(model: Path, converted: Path, tmp_path: Path):
    without = Path(shutil.copytree(model, tmp_path / "without"))
    for file in without.glob("tokenizer*"):
        file.unlink()
    assert "32 tokens (made up: no tokenizer for the prompt)" in compared(without, without).lines()[0]
    assert "made up" not in compared(model, converted, prompt="12+34=46;").lines()[0]
    assert "--prompt needs a tokenizer" in refused(without, without, prompt="12")
