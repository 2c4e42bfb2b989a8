"""Every dense family against transformers: the tensors it has, the logits it computes, the bits it gives back.

The ranks of a layout start once per family: they load the checkpoint, compute on two packs, and write it again.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.model import unwrap
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config import read_model_shape
from megatron_a3po.config.model_shape import Rope
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from megatron_a3po.weights.families import table_of
from tests.actor import ranks
from tests.actor.ranks import by_sequence, on_actors, random_sequences
from tests.weights.checkpoints import DENSE, VOCAB_SIZE, WINDOW, logits_of, read_model, write_dense
from tests.weights.test_round_trip import assert_identical, tensors_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp 2": {"tp": 2},
    "tp 2 sp": {"tp": 2, "sequence_parallel": True},
    "tp 2 pp 2 sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
}
# A pack of very unlike lengths goes through attention sequence by sequence, one of like lengths as a batch.
PACKS = {"ragged": [2, 31, 3, 17, 64, 2], "alike": [28, 25, 29], "within the window": [7, 8, 5]}
assert min(PACKS["alike"]) > WINDOW


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: write_dense(folder / name, name) for name in DENSE}


def hidden_and_weight(actor: Actor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each pack, this rank's last hidden states and its shard of the output projection; last stage only."""
    found = {}
    for name, lengths in PACKS.items():
        (pack,) = actor.pack(random_sequences(lengths, VOCAB_SIZE))
        keep = lambda pack, weight, hidden: (  # noqa: E731
            hidden.new_zeros(()),
            torch.zeros((), dtype=torch.int),
            (hidden[:, 0].detach().clone(), weight.detach().clone()),
        )
        with torch.no_grad():
            outputs = actor.pipeline._run([pack], keep, forward_only=True)
        if outputs:
            hidden, weight = outputs[0]
            found[name] = hidden.numpy(), weight.numpy()
    return found


def logits(on_ranks: list[dict], pack: str, sequence_parallel: bool) -> np.ndarray:
    """[rows, vocabulary] from what the tensor ranks of the last stage hold."""
    shards = [rank[pack] for rank in on_ranks if rank]
    hidden = np.concatenate([one for one, _ in shards]) if sequence_parallel else shards[0][0]
    return (hidden @ np.concatenate([weight for _, weight in shards]).T)[: sum(PACKS[pack]), :VOCAB_SIZE]


@cache
def expected_logits(checkpoint: Path, pack: str) -> np.ndarray:
    """The same from transformers, each sequence by itself, in float64."""
    model = read_model(checkpoint).double()
    sequences = random_sequences(PACKS[pack], VOCAB_SIZE)
    return torch.cat([logits_of(model, sequence.tokens) for sequence in sequences]).numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", DENSE)
def test_logits_are_those_of_transformers_and_weights_come_back_bit_for_bit(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, layout: str
):
    def compute_and_export(actor: Actor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        actor.write_hugging_face(tmp_path / "export")
        return hidden_and_weight(actor)

    keys = LAYOUTS[layout]
    on_ranks = on_actors(compute_and_export, checkpoints[family], **keys)
    assert_identical(tensors_of(tmp_path / "export"), tensors_of(checkpoints[family]))
    for pack in PACKS:
        expected = expected_logits(checkpoints[family], pack)
        found = logits(on_ranks, pack, keys.get("sequence_parallel", False))
        distance = np.abs(found - expected).max() / np.abs(expected).max()
        print(f"{pack}: {distance:.1e} of the largest logit, {np.abs(expected).max():.1f}")
        assert distance < 1e-6
        assert np.abs(expected).max() > 3  # they matter
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", local_files_only=True, output_loading_info=True
    )
    assert not any(loaded[1].values()), loaded[1]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_an_export_of_an_actor_in_training_has_its_log_probs(
    checkpoints: dict[str, Path], tmp_path: Path, family: str
):
    sequences = random_sequences(PACKS["ragged"], VOCAB_SIZE)

    def train_and_export(actor: Actor) -> dict[str, np.ndarray]:
        actor.start_stage(Schedule(1e-2, 0.0, 0, "constant", 10))
        assert actor.update(actor.pack(sequences), supervised_objective).applied
        actor.write_hugging_face(tmp_path / "export")
        packs = actor.pack(sequences)
        scores = [logp.numpy() for logp, _ in actor.score(packs)]  # by all ranks together
        return by_sequence(packs, scores) if actor.has_loss else {}

    keys = LAYOUTS["tp 2 pp 2 sp"]
    *_, found = on_actors(train_and_export, checkpoints[family], temperature=0.8, **keys)
    moved = tensors_of(tmp_path / "export")["model.norm.weight"]
    assert not torch.equal(moved, tensors_of(checkpoints[family])["model.norm.weight"])
    model = read_model(tmp_path / "export").double()
    for sequence in sequences:
        of_all = (logits_of(model, sequence.tokens)[:-1] / 0.8).log_softmax(-1).numpy()
        expected = np.take_along_axis(of_all, sequence.tokens[1:, None].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(found[sequence.name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_random_weights_are_a_model_of_the_family(checkpoints: dict[str, Path], tmp_path: Path, family: str):
    export = lambda actor: actor.write_hugging_face(tmp_path / "export")  # noqa: E731
    on_actors(export, checkpoints[family], tp=2, initialization="random")
    found = tensors_of(tmp_path / "export")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in tensors_of(checkpoints[family]).items()
    }
    assert found["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    norms = torch.cat([tensor for name, tensor in found.items() if "norm" in name])
    assert (norms == (0 if family == "gemma3_text" else 1)).all()  # a norm that leaves a vector as it is
    logits = logits_of(read_model(tmp_path / "export"), np.arange(2, 40))
    assert 0.05 < logits.std().item() < 0.5


SPECIAL: list[tuple[str, dict[str, Any]]] = [
    ("llama 3.1", {"rope": Rope()}),
    ("llama, linear", {"rope": Rope()}),
    ("mistral", {"windows": ()}),
    ("mistral", {"windows": (WINDOW + 1,) * 4}),
    ("qwen2, window", {"windows": (WINDOW,) * 4}),
    ("qwen3, window", {"windows": ()}),
    ("gemma3_text", {"windows": ()}),
    ("gemma3_text", {"local_rope": None}),
    ("gemma3_text", {"softmax_scale": None}),
    ("gemma3_text", {"embedding_scale": None}),
    ("gemma3_text", {"activation": "silu"}),
    ("gemma3_text", {"zero_centered_norms": False}),
]


@pytest.mark.parametrize(("family", "change"), SPECIAL, ids=str)
def test_what_is_special_in_a_family_matters(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, change: dict[str, Any]
):
    shape = replace(read_model_shape(checkpoints[family]), **change)
    monkeypatch.setattr(ranks, "read_model_shape", lambda folder: shape)
    found = logits(on_actors(hidden_and_weight, checkpoints[family]), "ragged", False)
    expected = expected_logits(checkpoints[family], "ragged")
    assert np.abs(found - expected).max() / np.abs(expected).max() > 1e-3


def test_gemmas_embeddings_are_scaled_as_bfloat16_rounds_the_scale(checkpoints: dict[str, Path]):
    tokens = torch.arange(VOCAB_SIZE)[None]

    def embedded(actor: Actor) -> np.ndarray:
        policy = unwrap(actor.model[0])
        return (policy.embedding(tokens, tokens) * policy.embedding_scale)[:, 0].detach().float().numpy()

    (found,) = on_actors(embedded, checkpoints["gemma3_text"], bf16=True)
    expected = (
        read_model(checkpoints["gemma3_text"])
        .bfloat16()
        .model.embed_tokens(tokens)[0]
        .detach()
        .float()
        .numpy()
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", DENSE)
def test_the_table_of_sizes_is_transformers(checkpoints: dict[str, Path], family: str):
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(checkpoints[family]).items()}
    assert table_of(read_model_shape(checkpoints[family])).tensors == found
