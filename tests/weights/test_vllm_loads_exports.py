"""What the actor writes, a real vLLM loads: its log-probs are the trainer's. Other weights are caught."""

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_a3po.actor.actor import Actor
from megatron_a3po.config.rollout import RolloutSection
from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.sampler import trajectory_of
from megatron_a3po.rollout.trajectory import Trajectory
from megatron_a3po.trainer.canary import prove_update
from megatron_a3po.trainer.probe import compare
from tests.actor.ranks import on_actors
from tests.vllm_server import VllmServer

TEMPERATURE = 0.8
PROMPT = Prompt(0, "", "", np.arange(2, 12, dtype=np.int32))


def respond(server: VllmServer, directory: Path) -> Trajectory:
    """By a server that has taken the weights of `directory`, which it calls version 0."""

    async def run() -> Trajectory:
        async with server.engine(directory=directory) as engine:
            answers = await engine.respond_each(SampleRequest(0, 0, PROMPT.tokens, 100, TEMPERATURE))
            (sample,) = answers.values()
            return trajectory_of(PROMPT, 0, sample, reward=None)

    return asyncio.run(run())


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_log_probs_of_an_export_are_the_trainers(vllm_server: VllmServer, tmp_path: Path, tp: int, pp: int):
    def write(actor: Actor) -> None:
        actor.write_hugging_face(tmp_path / "export")

    on_actors(write, vllm_server.versions[1], tp=tp, pp=pp)
    trajectory = respond(vllm_server, tmp_path / "export")

    def distance(actor: Actor) -> dict[str, float]:
        return compare(actor, trajectory)

    for found in on_actors(distance, vllm_server.versions[1], tp=tp, pp=pp, temperature=TEMPERATURE):
        assert found["sampler_trainer/tokens"] == trajectory.response_length > 0
        assert found["sampler_trainer/abs_diff/max"] < 1e-4


def test_the_canary_names_a_server_with_other_weights(vllm_server: VllmServer):
    """Every label says version 0, on the server whose files were swapped too."""
    right, wrong = (respond(vllm_server, vllm_server.versions[seed]) for seed in (0, 1))

    def prove(actor: Actor) -> list[str]:
        def run_with(answers: dict[str, Trajectory]) -> Any:
            future: Future[dict[str, Trajectory]] = Future()
            future.set_result(answers)
            config = SimpleNamespace(rollout=RolloutSection(engine="vllm"), actor=SimpleNamespace(bf16=False))
            return SimpleNamespace(
                actor=actor,
                config=config,
                source=SimpleNamespace(publishes=True),
                client=SimpleNamespace(canary=lambda version: future),
                progress=SimpleNamespace(step=0),
                num_published=0,
            )

        prove_update(run_with({"http://good": right}))
        with pytest.raises(RolloutError) as caught:
            prove_update(run_with({"http://bad": wrong, "http://good": right}))
        return caught.value.problems

    for (problem,) in on_actors(prove, vllm_server.versions[0], tp=2, temperature=TEMPERATURE):
        assert "the vLLM server http://bad says that it serves version 0" in problem
