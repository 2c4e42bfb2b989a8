"""A frozen policy in the model's place: it scores as an actor that loaded it would, and leaves no bit behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.reference import Reference
from megatron_a3po.errors import InputError
from tests.actor.ranks import on_actors, random_sequences
from tests.actor.replay import VOCAB_SIZE, write_model

LENGTHS = [2, 31, 3, 17, 40]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "one rank, bf16": {"bf16": True},
    "tp 2 pp 2 sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trained policy's weights and the reference's."""
    folder, tied = tmp_path_factory.mktemp(request.param), request.param == "tied"
    return write_model(folder / "target", tied=tied, seed=0), write_model(folder / "other", tied=tied, seed=1)


def logps(actor: Actor) -> list[torch.Tensor]:
    return [logp for logp, _ in actor.score(actor.pack(random_sequences(LENGTHS, VOCAB_SIZE)))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_scores_as_itself_and_gives_the_weights_back(models: tuple[Path, Path], layout: str) -> None:
    target, other = models

    def visited(actor: Actor) -> tuple[Any, ...]:
        reference = Reference(actor, other)
        before = {name: shard.clone() for name, shard in actor.shards()}
        own = logps(actor)
        with reference.in_place():
            meanwhile = logps(actor)
        changed = [name for name, shard in actor.shards() if not torch.equal(shard, before[name])]
        with pytest.raises(RuntimeError, match="in between"), reference.in_place():
            raise RuntimeError("in between")
        with reference.in_place():
            again = logps(actor)
        return own, logps(actor), meanwhile, again, changed

    expected = on_actors(logps, other, **LAYOUTS[layout])
    for alone, (before, after, meanwhile, again, changed) in zip(
        expected, on_actors(visited, target, **LAYOUTS[layout]), strict=True
    ):
        assert not changed
        for first, *others in zip(alone, meanwhile, again, strict=True):
            assert all(torch.equal(first, one) for one in others)
        for one, other_logp, back in zip(before, alone, after, strict=True):
            assert torch.equal(one, back)
            assert not torch.equal(one, other_logp)
    assert any(expected)


def test_a_directory_of_another_model_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    smaller = write_model(tmp_path / "smaller", num_layers=2)

    def refused(actor: Actor) -> str:
        with pytest.raises(InputError) as caught:
            Reference(actor, smaller)
        return str(caught.value)

    assert "bring weights and config.json of the same model" in on_actors(refused, models[0])[0]
