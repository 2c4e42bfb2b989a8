"""The target policy against transformers on the same weights: logits, and the log-probs the loss layer scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.model import unwrap
from tests.actor.ranks import by_sequence, on_actors, random_sequences
from tests.actor.replay import VOCAB_SIZE, read_model

LENGTHS = [2, 31, 3, 17, 40, 2, 64, 9]


@pytest.fixture(params=["untied", "tied"])
def either_model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("model" if request.param == "untied" else "tied_model")


@torch.no_grad()
def expected_logits(model: Path) -> list[torch.Tensor]:
    """[length, vocabulary] of each sequence by itself, in float64."""
    policy = read_model(model).double()
    sequences = random_sequences(LENGTHS, VOCAB_SIZE)
    return [policy(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0] for s in sequences]


@torch.no_grad()
def packed_logits(actor: Actor) -> np.ndarray:
    """[rows, this rank's vocabulary] of all sequences in one pack."""
    (pack,) = actor.pack(random_sequences(LENGTHS, VOCAB_SIZE))
    hidden = actor.model[0](pack.tokens, pack.position_ids, pack.packed)
    return (hidden[:, 0] @ unwrap(actor.model[0]).output_weight.T).numpy()


def scores(actor: Actor) -> dict[str, dict[str, np.ndarray]]:
    """Log-prob and entropy of every trained token, by sequence; empty but on the last stage."""
    packs = actor.pack(random_sequences(LENGTHS, VOCAB_SIZE))
    scored = actor.score(packs)
    if not scored:
        return {}
    logp, entropy = zip(*((a.numpy(), b.numpy()) for a, b in scored), strict=True)
    return {"logp": by_sequence(packs, list(logp)), "entropy": by_sequence(packs, list(entropy))}


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_of_a_pack_are_those_of_its_sequences_alone(either_model: Path, tp: int):
    expected = torch.cat(expected_logits(either_model)).numpy()
    shards = on_actors(packed_logits, either_model, tp=tp)
    found = np.concatenate(shards, axis=1)[: len(expected), :VOCAB_SIZE]
    distance = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{distance:.1e} of the largest logit")
    assert distance < 1e-6
    assert np.abs(expected).max() > 3  # they matter


@pytest.mark.parametrize(
    "layout",
    [{}, {"tp": 2, "sequence_parallel": True}, {"tp": 2, "pp": 2}],
    ids=["one rank", "tp 2 sp", "tp 2 pp 2"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scored_log_probs_are_those_of_the_sampled_distribution(
    either_model: Path, layout: dict[str, Any], temperature: float
):
    keys = {"temperature": temperature, "max_tokens_per_micro_batch": 80, "loss_chunk_tokens": 16, **layout}
    found = [rank for rank in on_actors(scores, either_model, **keys) if rank]
    assert len(found) == layout.get("tp", 1)  # every tensor rank of the last stage has all of them
    sequences = random_sequences(LENGTHS, VOCAB_SIZE)
    for sequence, logits in zip(sequences, expected_logits(either_model), strict=True):
        logp = (logits / temperature).log_softmax(-1)[:-1]
        labels = torch.from_numpy(sequence.tokens[1:].astype(np.int64))
        expected = {
            "logp": logp.gather(1, labels[:, None])[:, 0].numpy(),
            "entropy": -(logp.exp() * logp).sum(-1).numpy(),
        }
        for rank in found:
            for quantity, values in expected.items():
                np.testing.assert_allclose(rank[quantity][sequence.name], values, atol=1e-5, rtol=0)


def test_the_model_counts_the_tokens_that_go_through_it(model: Path):
    def counted(actor: Actor) -> list[int]:
        packs = actor.pack(random_sequences(LENGTHS, VOCAB_SIZE))
        counts = [actor.tokens_forwarded]
        for _ in range(2):
            actor.score(packs)
            counts.append(actor.tokens_forwarded)
        return counts

    total = sum(LENGTHS)
    layouts: list[dict[str, Any]] = [{}, {"pp": 2, "virtual_pipeline_model_parallel_size": 2}]
    for layout in layouts:
        assert on_actors(counted, model, **layout)[0] == [0, total, 2 * total]
