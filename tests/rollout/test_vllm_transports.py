"""The collective transport into real vLLM servers, staged and not: log-probs, requests under way, a server killed."""

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.vllm import VllmEngine
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.sampler import trajectory_of
from megatron_a3po.rollout.trajectory import Trajectory
from megatron_a3po.rollout.vllm.places import GivenPlace, LaunchedPlace, Place
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.trainer.probe import compare
from megatron_a3po.trainer.source import from_main
from megatron_a3po.vocab_parallel.policy_objective import supervised_objective
from megatron_a3po.weights.safetensors_file import Announced
from megatron_a3po.weights.transports.base import Export
from megatron_a3po.weights.transports.collective import CollectiveTransport
from tests.actor.ranks import on_actors, random_sequences
from tests.distributed.ranks import run_ranks
from tests.rollout.test_vllm import TOLERANCE, boundaries, distance, request
from tests.vllm_server import VOCAB_SIZE, VllmServer

T = TypeVar("T")
TEMPERATURE = 0.8
LOADED_S = 900.0  # on a machine that does ten other things
BUCKET_BYTES = 20_000  # of a model of 300 kB
PROMPT = Prompt(0, "", "", np.arange(2, 12, dtype=np.int32))


async def unless_failed(engine: VllmEngine, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, or what ended the engine."""
    working, failing = asyncio.ensure_future(work), asyncio.ensure_future(engine.failed())
    await asyncio.wait([working, failing], return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        failing.result()
    return working.result()


def connect(server: VllmServer, url: str, *, is_staged: bool) -> Server:
    return Server(url, token=server.token, on_update="recompute_kv", timeout_s=120, is_staged=is_staged)


def place(server: VllmServer, *, is_staged: bool) -> Place:
    return GivenPlace(server.url, lambda url: connect(server, url, is_staged=is_staged), timeout_s=60)


def transport() -> CollectiveTransport:
    return CollectiveTransport(torch.device("cpu"), bucket_bytes=BUCKET_BYTES, loopback_only=True)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_after_a_transfer_log_probs_are_the_trainers(
    vllm_server: VllmServer, tmp_path: Path, tp: int, pp: int
):
    """Of weights in training, gathered from all ranks, for a server that comes alone; staged and not."""

    async def respond(version: int, is_staged: bool) -> Trajectory:
        directory = tmp_path / f"version-{version}"
        places = [place(vllm_server, is_staged=is_staged)]
        async with vllm_server.engine(directory=directory, places=places) as engine:
            asked = SampleRequest(0, 0, PROMPT.tokens, 60, TEMPERATURE)
            answers = await unless_failed(engine, engine.respond_each(asked))
            (sample,) = answers.values()
            assert (sample.versions == version).all()
            return trajectory_of(PROMPT, 0, sample, reward=None)

    def play(actor: Actor) -> list[dict[str, float]]:
        actor.start_stage(Schedule(1e-2, 0.0, 0, "constant", 10))
        packs = actor.pack(random_sequences([9, 14, 5, 7], VOCAB_SIZE))
        sender = transport()
        found = []
        for version, is_staged in ((1, False), (2, True)):
            assert actor.update(packs, supervised_objective).applied
            sender.publish(actor.export(), version, tmp_path / f"version-{version}", lambda: None)
            trajectory = from_main(actor.grid, lambda: asyncio.run(respond(version, is_staged)))  # noqa: B023
            found.append(compare(actor, trajectory))
        sender.close()
        return found

    ranks = on_actors(play, vllm_server.versions[1], tp=tp, pp=pp, temperature=TEMPERATURE, run_s=LOADED_S)
    for found in ranks:
        for one in found:
            assert one["sampler_trainer/tokens"] > 0
            assert one["sampler_trainer/abs_diff/max"] < TOLERANCE


def export_of(directory: Path, go_on: threading.Event | None = None) -> Export:
    """A whole model of this one rank; with an event, half of it comes only after."""
    tensors = list(load_file(directory / "model.safetensors").items())

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(tensors):
            if go_on is not None and number == len(tensors) // 2:
                go_on.wait()
            yield pair

    announced = [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    assert dist.group.WORLD is not None
    return Export(stream(), announced, directory, dist.group.WORLD, dist.group.WORLD)


def on_one_rank(play: Any) -> Any:
    """The transport belongs to a trainer rank, and its process group."""
    return run_ranks(lambda rank, world_size: play(), 1, timeout_s=LOADED_S)[0]


@pytest.mark.parametrize("is_staged", [False, True])
def test_requests_under_way_go_on_under_the_new_weights(
    vllm_server: VllmServer, tmp_path: Path, is_staged: bool
):
    """Updates in a row through one channel, until one has reached requests half-way."""
    requests = [request(index, 150) for index in range(4)]

    async def run(sender: CollectiveTransport) -> tuple[list[Sample], dict[str, float]]:
        async with vllm_server.engine(places=[place(vllm_server, is_staged=is_staged)], eos=False) as engine:
            for version in range(1, 11):
                generating = asyncio.create_task(engine.generate(requests))
                await unless_failed(engine, some_under_way(engine, generating))
                directory = tmp_path / f"version-{version}"
                export = export_of(vllm_server.versions[version % 3])
                sender.publish(export, version, directory, lambda: None)
                assert await engine.update_weights(version, directory) == version
                samples = await generating
                if any(map(boundaries, samples)):
                    return samples, dict(engine.publication_metrics())
        raise AssertionError("no update reached a response under way")

    def play() -> tuple[list[Sample], dict[str, float]]:
        sender = transport()
        try:
            return asyncio.run(run(sender))
        finally:
            sender.close()

    samples, metrics = on_one_rank(play)
    for one, sample in zip(requests, samples):
        assert len(sample.tokens) == 150
        assert distance(vllm_server, one, sample).max() < TOLERANCE
    num_bytes = (vllm_server.versions[2] / "model.safetensors").stat().st_size
    assert abs(metrics["publish/bytes"] - num_bytes) < 10_000
    assert 0 < metrics["publish/stall_s"] <= metrics["publish/duration_s"]
    if is_staged:
        assert "in a shadow of the model" in (vllm_server.versions[0].parent / "vllm.log").read_text()


async def some_under_way(engine: VllmEngine, generating: "asyncio.Task[Any]") -> None:
    """Or all done already, where this process was not given a core in between."""
    while not generating.done() and not any(server.tokens_in_flight for server in engine._fleet.serving):
        await asyncio.sleep(0.01)


def test_a_server_killed_in_a_transfer_holds_nobody_up_and_comes_back_with_the_weights(
    vllm_server: VllmServer, tmp_path: Path
):
    launch = replace(vllm_server.launch, max_samples=4)
    go_on = threading.Event()

    async def run(sender: CollectiveTransport) -> list[tuple[str, Sample]]:
        launched = LaunchedPlace(
            launch, tmp_path / "vllm.log", lambda url: connect(vllm_server, url, is_staged=False)
        )
        places = [place(vllm_server, is_staged=True), launched]
        async with vllm_server.engine(places=places, eos=False) as engine:
            await unless_failed(engine, both_serve(engine, 0))
            directory = tmp_path / "version-1"
            export = export_of(vllm_server.versions[1], go_on)
            publishing = asyncio.create_task(
                asyncio.to_thread(sender.publish, export, 1, directory, lambda: None)
            )
            while not directory.exists():
                await asyncio.sleep(0.05)
            updating = asyncio.create_task(engine.update_weights(1, directory))
            while sender._sender is None or sender._sender._channel is None:
                await asyncio.sleep(0.05)
            assert launched.pid is not None
            os.killpg(launched.pid, signal.SIGKILL)
            go_on.set()
            await publishing
            assert await updating == 1
            alone = await engine.respond_each(request(0, 20))
            await unless_failed(engine, both_serve(engine, 1))
            both = await engine.respond_each(request(0, 20))
            assert len(alone) == 1
            assert len(both) == 2
            return [*alone.items(), *both.items()]

    async def both_serve(engine: VllmEngine, version: int) -> None:
        while len(engine._fleet.serving) < 2 or engine.version < version:
            await asyncio.sleep(0.1)

    def play() -> list[tuple[str, Sample]]:
        sender = transport()
        try:
            return asyncio.run(run(sender))
        finally:
            sender.close()

    for _, sample in on_one_rank(play):
        assert (sample.versions == 1).all()
        assert distance(vllm_server, request(0, 20), sample).max() < TOLERANCE
