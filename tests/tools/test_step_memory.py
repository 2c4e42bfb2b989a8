"""Dense logits in the layer's place: the same loss and gradient, at the price of their size."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.actor.pipeline import Pipeline
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from tests.actor.ranks import on_actors, random_sequences
from tests.actor.replay import VOCAB_SIZE, write_model

LENGTHS = [40, 3, 64, 17]


@pytest.fixture(scope="module")
def step_memory() -> Any:
    """The tool, which finds its neighbours by their plain names."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("step_memory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_layers=2)


def updated(actor: Actor, kind: type[Pipeline]) -> tuple[float, float]:
    """(loss, gradient norm) of an update by this pipeline."""
    actor.start_stage(Schedule(1e-3, 0.0, 0, "constant", 10))
    actor.pipeline = kind(actor.model, actor.grid, actor.pipeline.settings)
    done = actor.update(actor.pack(random_sequences(LENGTHS, VOCAB_SIZE)), supervised_objective)
    return float(done.loss_sum), done.grad_norm


def test_dense_logits_train_alike(step_memory: Any, model: Path) -> None:
    found = {}
    for name, layout in {"one": {}, "tp": {"tp": 2}, "sp": {"tp": 2, "sequence_parallel": True}}.items():
        dense = on_actors(lambda actor: updated(actor, step_memory.DensePipeline), model, **layout)
        found[name] = dense[0]
    ours = on_actors(lambda actor: updated(actor, Pipeline), model)[0]
    assert found["one"] == pytest.approx(ours, rel=2e-6)
    # Under TP 2 dense logits have a column of padding, which this layer leaves out.
    assert found["sp"] == pytest.approx(found["tp"], rel=2e-6)
    assert found["tp"] == pytest.approx(ours, rel=2e-2)


def test_dense_logits_leave_less_room(step_memory: Any, model: Path) -> None:
    lengths = (64, 128)

    def peaks(actor: Actor) -> list[Any]:
        actor.start_stage(Schedule(1e-3, 0.0, 0, "constant", 10))
        sequences = [step_memory.lone_sequence(length, 0.25, VOCAB_SIZE) for length in lengths]
        kinds = (Pipeline, step_memory.DensePipeline)
        return [step_memory.measure_peaks(actor, kind, supervised_objective, sequences) for kind in kinds]

    layer, dense = on_actors(peaks, model, loss_chunk_tokens=16)[0]
    num_parameters = sum(tensor.numel() for tensor in _weights(model).values())
    # Weights and gradients in float32; moments come with the first step.
    assert layer.held == dense.held == pytest.approx(2 * 4 * num_parameters, rel=0.01)
    grown = (dense.peaks[1] - dense.peaks[0]) - (layer.peaks[1] - layer.peaks[0])
    assert grown > 0  # at this size the layers' activations are nearly all of either
    assert dense.longest(1e9) < layer.longest(1e9)


def _weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(model.glob("*.safetensors")))
