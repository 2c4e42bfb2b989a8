"""A run with a workflow of two turns through the production command: what is trained, shown and repeated."""

from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.rollout.workflow import Episode
from tests.trainer.replay import exported, identical
from tests.trainer.task import Task
from tests.trainer.test_asynchronous import repeatable
from tests.trainer.test_shown import samples_of

GIVEN = "1+1="
SETTINGS = [
    "rollout.workflow=tests.trainer.test_multi_turn:asked_again",
    "rollout.fixed_staleness=1",
    "trainer.steps=3",
    "trainer.sample_every=1",
]


async def asked_again(episode: Episode) -> None:
    await episode.generate(max_tokens=6)
    episode.give(GIVEN)
    await episode.generate(max_tokens=6)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("multi-turn"))


def test_a_run_trains_on_generated_tokens_alone_and_repeats(task: Task) -> None:
    rows = task.run("once", *SETTINGS)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        trajectories = task.batch("once", row["step"]).trajectories
        for one in trajectories:
            ((start, end),) = one.given
            assert end - start == len(GIVEN)
            assert 1 <= start - one.prompt_length <= 6
            assert (one.versions[one.generated] == max(row["version"] - 1, 0)).all()
            assert (one.versions[~one.generated] == -1).all()
        assert row["tokens/trained"] == sum(int(one.generated.sum()) for one in trajectories)
        assert row["forwards_per_token"] == 1.0
        assert np.isfinite(row["loss"])
        assert row["grad_norm"] > 0
    # The trainer scores every generated token as the engine did, over the same given ones.
    assert rows[0]["sampler_trainer/tokens"] == rows[0]["tokens/trained"]
    assert rows[0]["sampler_trainer/abs_diff/max"] < 1e-4
    for sample in samples_of(task.folder / "once"):
        untrained = [version == -1 for version in sample["versions"]]
        assert [logp is None for logp in sample["logp"]] == untrained
        assert GIVEN in sample["response"]
    assert repeatable(task.run("again", *SETTINGS)) == repeatable(rows)
    assert identical(exported(Path(task.folder / "again")), exported(Path(task.folder / "once")))
