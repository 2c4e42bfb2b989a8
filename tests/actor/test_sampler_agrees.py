"""Sampler and trainer score the same tokens alike at equal versions: measured by a real run, over every sampled token.

A bound of 0 makes each step's tokens fresh; the engine's published weights, its cache, its temperature and the actor's
layout all have a part in the difference.
"""

from pathlib import Path

from tests.actor.replay import layout, replay

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
