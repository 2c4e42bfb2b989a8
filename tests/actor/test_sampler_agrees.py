"""Sampler and trainer score the same tokens alike at equal versions: measured by a real run, over every sampled token.

A bound of 0 makes each step's tokens fresh; the engine's published weights, its cache, its temperature and the actor's
layout all have a part in the difference. For every family, the decoder and an actor by themselves: prefixes are longer
than a window, rows move, and halfway the caches are computed again.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.actor.actor import Actor
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.decoder import Decoder
from megatron_a3po.trainer.batch import supervised_sequence
from tests.actor.ranks import by_sequence, on_actors
from tests.actor.replay import layout, replay
from tests.weights.checkpoints import DENSE, EOS_ID, VOCAB_SIZE, WINDOW, read_model, write_dense

FRESH = [
    "trainer.replay=null",
    "reward.type=exact_number",
    "rollout.max_staleness=0",
    "rollout.filter_no_signal=false",
    "rollout.temperature=0.8",
    "actor.num_mini_batches=1",
    "actor.lr=1e-2",  # versions that clearly differ: a label that is off by one would show
    "actor.behave_weight_cap=50",
]


def test_at_equal_versions_sampler_and_trainer_agree(config: Path):
    run = replay(config, "fresh", *FRESH, "trainer.steps=3", *layout(tp=2))
    print(run.column("sampler_trainer/abs_diff/max"))
    assert len(run.rows) == 3
    assert (run.column("sampler_trainer/tokens") == run.column("tokens/trained")).all()
    assert (run.column("sampler_trainer/abs_diff/max") < 1e-4).all()


def sampled(model: Path) -> dict[str, tuple[np.ndarray, Sample]]:
    """16 responses of up to 40 tokens to prompts of up to 20, decoded six at a time: name -> prompt, response."""
    rng = np.random.default_rng(5)
    decoder = Decoder(read_model(model), [EOS_ID], seed=7, max_rows=6)
    prompts = {}
    for number in range(16):
        prompts[str(number)] = rng.integers(2, VOCAB_SIZE, rng.integers(1, 21)).astype(np.int32)
        request = SampleRequest(number, 0, prompts[str(number)], int(rng.integers(1, 41)), 0.8)
        decoder.add(request, str(number))
    finished, steps = [], itertools.count()
    while not decoder.idle:
        if next(steps) == 25:
            decoder.invalidate()
        finished += decoder.step(version=0)
    return {str(one.ticket): (prompts[str(one.ticket)], one.sample) for one in finished}


@pytest.mark.parametrize("family", DENSE)
def test_every_family_is_sampled_as_it_is_trained(tmp_path: Path, family: str):
    model = write_dense(tmp_path / "model", family)
    samples = sampled(model)
    sequences = [supervised_sequence(name, prompt, one.tokens) for name, (prompt, one) in samples.items()]
    assert max(len(sequence) for sequence in sequences) > 4 * WINDOW

    def scores(actor: Actor) -> dict[str, np.ndarray]:
        packs = actor.pack(sequences)
        return by_sequence(packs, [logp.numpy() for logp, _ in actor.score(packs)])

    keys = {"tp": 2, "temperature": 0.8, "max_tokens_per_micro_batch": 128}
    scored, _ = on_actors(scores, model, **keys)
    distance = max(float(np.abs(scored[name] - one.logps).max()) for name, (_, one) in samples.items())
    print(f"{distance:.1e}")
    assert distance < 1e-5
