"""What users bring and `train` cannot use: one sentence and exit code 2, mostly before anything heavy is imported.

Each is made by damaging a folder that is fine, which the first test starts with. More of what tensors can be wrong is
in tests/weights/test_sources.py.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run_files import MODEL, ROWS, write_model, write_rows, write_run
from tests.safetensors_files import Tensors, safetensors_bytes
from tests.test_main import assert_refused, command
from tests.trainer.command import run

HIDDEN, FFN, KEY_VALUE = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["hidden_size"] // 2
OF_A_LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.bias": (HIDDEN,),
    "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
    "self_attn.k_proj.bias": (KEY_VALUE,),
    "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj.bias": (KEY_VALUE,),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
}
LAYERS: Tensors = {
    f"model.layers.{layer}.{name}": ("BF16", size)
    for layer in range(MODEL["num_hidden_layers"])
    for name, size in OF_A_LAYER.items()
}
EMBEDDING: Tensors = {"model.embed_tokens.weight": ("BF16", (MODEL["vocab_size"], HIDDEN))}
NORM: Tensors = {"model.norm.weight": ("BF16", (HIDDEN,))}
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"
WEIGHT_MAP = dict.fromkeys([*EMBEDDING, *LAYERS], FIRST) | dict.fromkeys(NORM, SECOND)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on pretrained weights in two shards."""
    file = write_run(tmp_path)
    file.write_text(file.read_text().replace("initialization: random", "initialization: pretrained"))
    for name, tensors in ((FIRST, EMBEDDING | LAYERS), (SECOND, NORM)):
        (tmp_path / "model" / name).write_bytes(safetensors_bytes(tensors))
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    return file


def test_the_folder_is_fine_before_it_is_damaged(run_file: Path):
    ended = run(run_file.parent / "out", "train", "--dry-run", str(run_file))
    assert ended.code == 0, ended.output
    assert "hf_path" in ended.output


def shard(tensors: dict) -> Callable[[Path], object]:
    return lambda model: (model / "model-2.safetensors").write_bytes(safetensors_bytes(tensors))


def cut(model: Path) -> None:
    os.truncate(model / "model-2.safetensors", (model / "model-2.safetensors").stat().st_size - 1)


def no_weights(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()


def only_pickles(model: Path) -> None:
    no_weights(model)
    (model / "pytorch_model.bin").write_bytes(b"")


def tokenizer(**content: object) -> Callable[[Path], object]:
    return lambda model: (model / "tokenizer.json").write_text(json.dumps(content))


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def no_sentencepiece(model: Path) -> None:
    no_tokenizer(model)
    (model / "tokenizer.model").write_bytes(b"nonsense")


def chats(model: Path) -> None:
    write_rows(
        model.parent / "train.jsonl",
        [*ROWS, {"messages": [{"role": "user", "content": "a"}], "answer": "1"}],
    )


LARGE = {f"t{number}": number for number in range(MODEL["vocab_size"] + 2)}
QUANTISED = {"model.norm.weight": ("F8_E4M3", (64,)), "model.norm.weight_scale_inv": ("F32", (1,))}
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (
        lambda model: (model / "model-2.safetensors").unlink(),
        ["model.safetensors.index.json names model-2.safetensors, which is missing", "copy it there"],
    ),
    "truncated shard": (cut, ["model-2.safetensors is cut short", "copy or download it again"]),
    "no weights": (
        no_weights,
        ["no *.safetensors", "or start from random weights with model.initialization="],
    ),
    "no safetensors": (only_pickles, ["only as pytorch_model.bin", "if you trust its origin", "python -c"]),
    "tensor the index invents": (
        shard({}),
        ["says that model.norm.weight lies in model-2.safetensors, which does not hold it"],
    ),
    "tensor in two files": (
        shard({**EMBEDDING, **NORM}),
        ["model.embed_tokens.weight lies in", "model-1.safetensors and in", "remove the file"],
    ),
    "quantised": (shard(QUANTISED), ["model-2.safetensors has model.norm.weight as F8_E4M3"]),
    "another vocabulary": (
        lambda model: write_model(model, vocab_size=40),
        ["model.embed_tokens.weight for a vocabulary of 30", "vocab_size=40"],
    ),
    "tokens without embedding": (
        tokenizer(model={"type": "BPE", "vocab": LARGE}),
        ["has 32 tokens", "vocab_size=30", '"t30"'],
    ),
    "added token without embedding": (
        tokenizer(added_tokens=[{"id": 30, "content": "<|new|>"}]),
        ["has 31 tokens", "vocab_size=30", '"<|new|>"'],
    ),
    "no tokenizer": (no_tokenizer, ["has no tokenizer"]),
    "no SentencePiece": (no_sentencepiece, ["tokenizer.model is no SentencePiece model"]),
    "chats without a template": (
        chats,
        ["data.train: ", "train.jsonl:5 has messages", "chat_template.jinja"],
    ),
}


def change(model: Path) -> None:
    """Another family's config.json: Llama has no biases."""
    write_model(model, model_type="llama")


def fewer(model: Path) -> None:
    write_model(model, num_key_value_heads=4)


OTHERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "unknown tensor": (
        shard({**NORM, "model.layers.0.mlp.experts.0.up_proj.weight": ("BF16", (4, 4))}),
        [
            "is not the qwen2 model",
            "has model.layers.0.mlp.experts.0.up_proj.weight, which is none of its tensors",
        ],
    ),
    "another family": (change, ["is not the llama model", "self_attn.k_proj.bias"]),
    "another shape": (
        fewer,
        [
            "model-1.safetensors has model.layers.0.self_attn.k_proj.weight of shape (32, 64)",
            "asks for (64, 64)",
        ],
    ),
}


@pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(("damage", "fragments"), OTHERS.values(), ids=OTHERS)
def test_tensors_that_are_not_the_models(
    run_file: Path, damage: Callable[[Path], object], fragments: list[str], mode: list[str]
):
    """What takes torch to know; the ranks of a run look before they join."""
    damage(run_file.parent / "model")
    overrides = ["actor.tensor_model_parallel_size=2", f"run_dir={run_file.parent}/run"]
    ended = run(run_file.parent / "out", "train", str(run_file), *mode, *overrides)
    assert ended.code == 2, ended.output
    (said,) = ended.output.splitlines()
    assert all(fragment in said for fragment in fragments), said
    assert said.endswith(".")


@pytest.mark.parametrize(("damage", "fragments"), REFUSED.values(), ids=REFUSED)
def test_refused(run_file: Path, damage: Callable[[Path], object], fragments: list[str]):
    damage(run_file.parent / "model")
    outcome = command(run_file.parent, "train", "--dry-run", str(run_file))
    assert_refused(outcome, *fragments)
    assert len(outcome.stderr.splitlines()) == 1
    assert "model.hf_path: " in outcome.stderr or "data.train: " in outcome.stderr


def test_the_way_to_convert_pickled_weights_works(run_file: Path):
    """The command that the sentence gives, on weights as torch writes them; then the run can begin."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = run_file.parent / "model"
    only_pickles(model)
    weights = Qwen2ForCausalLM(Qwen2Config(**MODEL)).state_dict()
    torch.save(weights, model / "pytorch_model.bin")
    refused = command(run_file.parent, "train", str(run_file))
    assert_refused(refused, "python -c")
    said = shlex.split(refused.stderr[refused.stderr.index("python -c") :])
    subprocess.run([sys.executable, *said[1:3]], check=True, capture_output=True, timeout=120)

    converted = f"{model}-safetensors"
    Path(converted, "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    outcome = command(run_file.parent, "train", "--dry-run", str(run_file), f"model.hf_path={converted}")
    assert outcome.exit_code == 0, outcome.stderr
