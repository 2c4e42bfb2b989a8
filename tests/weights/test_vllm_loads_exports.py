"""What the actor writes, a real vLLM loads: its log-probs are the trainer's. Other weights are caught."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config.rollout import RolloutSection
from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.sampler import trajectory_of
from megatron_a3po.rollout.trajectory import Trajectory
from megatron_a3po.trainer.canary import prove_update
from megatron_a3po.trainer.probe import compare
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from tests.actor.ranks import on_actors, random_sequences
from tests.vllm_server import QWEN3, VOCAB_SIZE, VllmServer, serve
from tests.weights.checkpoints import logits_of, read_model

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


def train(actor: Actor) -> None:
    """One optimizer step, by which every weight moves."""
    actor.start_stage(Schedule(1e-2, 0.0, 0, "constant", 10))
    packs = actor.pack(random_sequences([9, 14, 5, 7], VOCAB_SIZE))
    assert actor.update(packs, supervised_objective).applied


@pytest.fixture
def qwen3_server(tmp_path: Path) -> Iterator[VllmServer]:
    yield from serve(tmp_path, QWEN3)


def test_a_server_of_another_family_has_the_trainers_log_probs(qwen3_server: VllmServer, tmp_path: Path):
    """One with norms of queries and keys."""
    check_log_probs(qwen3_server, tmp_path, tp=2, pp=1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_log_probs_of_an_export_in_training_are_the_trainers(
    vllm_server: VllmServer, tmp_path: Path, tp: int, pp: int
):
    check_log_probs(vllm_server, tmp_path, tp, pp)


def check_log_probs(vllm_server: VllmServer, tmp_path: Path, tp: int, pp: int) -> None:
    """What a server says of a response is what the trainer and transformers say, once a step moved every weight."""

    def write(actor: Actor) -> None:
        train(actor)
        actor.write_hugging_face(tmp_path / "export")

    on_actors(write, vllm_server.versions[1], tp=tp, pp=pp, temperature=TEMPERATURE)
    trajectory = respond(vllm_server, tmp_path / "export")

    def distances(actor: Actor) -> list[dict[str, float]]:
        before = compare(actor, trajectory)
        train(actor)  # the same step as the one that was exported
        return [before, compare(actor, trajectory)]

    ranks = on_actors(distances, vllm_server.versions[1], tp=tp, pp=pp, temperature=TEMPERATURE)
    for before, after in ranks:
        assert after["sampler_trainer/tokens"] == trajectory.response_length > 0
        assert after["sampler_trainer/abs_diff/max"] < 1e-4
        assert before["sampler_trainer/abs_diff/max"] > 1e-2
    logits = logits_of(read_model(tmp_path / "export"), trajectory.tokens)[:-1] / TEMPERATURE
    expected = logits.log_softmax(-1).numpy()[range(len(logits)), trajectory.tokens[1:]]
    start = trajectory.prompt_length
    np.testing.assert_allclose(trajectory.behave_logp[start:], expected[start - 1 :], rtol=0, atol=1e-4)


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
