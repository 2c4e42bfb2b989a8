"""A checkpoint goes on in another layout: the same weights to the bit, the same next step to rounding, moments too."""

import multiprocessing
import pickle
import shutil
from dataclasses import replace
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata

from megatron_a3po.actor import checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.errors import InputError
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from megatron_a3po.weights.unpickling import read_metadata
from tests.actor.ranks import on_actors, random_sequences
from tests.actor.replay import VOCAB_SIZE
from tests.trainer.checkpoints import read_plain, read_tensors

SAVED: dict[str, Any] = {"tp": 2, "pp": 2}
RESUMED: dict[str, dict[str, Any]] = {
    "pp 4": {"pp": 4},
    "pp 2 interleaved": {"pp": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp 2 sp": {"tp": 2, "sequence_parallel": True},
}

# Megatron-Core 0.19's own calls of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
]


def train(actor: Actor, step: int) -> None:
    update = actor.update(
        actor.pack(random_sequences([9, 14, 5, 7], VOCAB_SIZE, seed=step)), supervised_objective
    )
    assert update.applied


def start(actor: Actor) -> None:
    actor.start_stage(Schedule(1e-3, 0.0, 2, "cosine", 10))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.mark.parametrize("embedding", ["model", "tied_model"])
def test_another_layout_goes_on_from_a_checkpoint(
    request: pytest.FixtureRequest, tmp_path: Path, embedding: str
):
    model: Path = request.getfixturevalue(embedding)
    saved = tmp_path / "actor"
    saved.mkdir()

    def save(actor: Actor) -> None:
        start(actor)
        for step in (1, 2):
            train(actor, step)
        checkpoint.save(actor, saved)
        actor.write_hugging_face(tmp_path / "saved")
        for step in (3, 4):
            train(actor, step)
        actor.write_hugging_face(tmp_path / "straight")

    on_actors(save, model, **SAVED)
    before, straight = weights(tmp_path / "saved"), weights(tmp_path / "straight")
    moved = max((straight[name] - before[name]).abs().max().item() for name in before)
    for name, layout in RESUMED.items():

        def resume(actor: Actor, name: str = name) -> None:
            start(actor)
            checkpoint.load(actor, saved)
            actor.write_hugging_face(tmp_path / f"{name} loaded")
            for step in (3, 4):
                train(actor, step)
            actor.write_hugging_face(tmp_path / f"{name} went on")

        on_actors(resume, model, initialization="random", **layout)
        loaded, went_on = weights(tmp_path / f"{name} loaded"), weights(tmp_path / f"{name} went on")
        assert not [key for key in before if not torch.equal(loaded[key], before[key])]
        distance = max((went_on[key] - straight[key]).abs().max().item() for key in straight)
        print(f"{name}: {distance:.1e}, of a way of {moved:.1e}")
        assert distance < 1e-5
        assert moved > 1e-3


@pytest.mark.parametrize(
    ("embedding", "layout"),
    [("tied_model", {"tp": 2, "dp": 2}), ("model", {"pp": 2, "dp": 2}), ("tied_model", {"pp": 2, "dp": 2})],
)
def test_it_holds_what_megatron_core_would_have_saved(
    request: pytest.FixtureRequest, tmp_path: Path, embedding: str, layout: dict[str, Any]
):
    model: Path = request.getfixturevalue(embedding)
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir()
    theirs.mkdir()

    def save(actor: Actor) -> None:
        start(actor)
        for step in (1, 2):
            train(actor, step)
        checkpoint.save(actor, own)
        save_by_megatron_core(actor, theirs)

    on_actors(save, model, **layout)
    mine, wanted = read_tensors(own), read_tensors(theirs)
    assert mine.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(mine[name], wanted[name])]
    assert {name.split(".")[2] for name in mine if name.startswith("optimizer.")} == {
        "param",
        "exp_avg",
        "exp_avg_sq",
    }
    assert read_plain(own) == read_plain(theirs)


def test_what_is_missing_or_surplus_is_named(model: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    whole.mkdir()
    name = "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight"

    def changed(to: str, metadata: Metadata) -> Path:
        directory = tmp_path / to
        shutil.copytree(whole, directory)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        return directory

    def load(actor: Actor) -> None:
        start(actor)
        checkpoint.save(actor, whole)
        metadata = read_metadata(whole)
        tensors = metadata.state_dict_metadata
        surplus = changed(
            "surplus", replace(metadata, state_dict_metadata={**tensors, "other": tensors[name]})
        )
        with pytest.raises(InputError, match="surplus is of another model: it has the unknown other"):
            checkpoint.load(actor, surplus)
        left = {key: one for key, one in tensors.items() if key != name}
        missing = changed("missing", replace(metadata, state_dict_metadata=left))
        with pytest.raises(InputError, match=f"missing is of another model: it lacks {name}"):
            checkpoint.load(actor, missing)
        checkpoint.load(actor, whole)

    on_actors(load, model)


def save_by_megatron_core(actor: Actor, directory: Path) -> None:
    """Its own writer, which gathers the optimizer's shards over the data axis first."""
    optimizer = checkpoint._optimizer(actor)
    state = checkpoint._sharded_stages(actor.model)
    with checkpoint._buckets_counted_with_padding(optimizer):
        state["optimizer"] = optimizer.megatron.sharded_state_dict(
            state, is_loading=False, metadata=dict(checkpoint._METADATA)
        )
    state["scheduler"] = optimizer.scheduler.state_dict()
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))  # a spawned one imports everything again
    manager.start()
    filesystem_async._results_queue = manager.Queue()
    dist_checkpointing.save(state, str(directory), content_metadata=dict(checkpoint._METADATA))
    manager.shutdown()
