"""An evaluation is of one stated version, whatever is published meanwhile, and training rollouts go on."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from megatron_a3po.rollout.engines.base import RolloutEngine, Sample, SampleRequest
from megatron_a3po.rollout.engines.local import LocalEngine
from megatron_a3po.rollout.evaluation import evaluate
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.rollout.vllm.fleet import Fleet
from megatron_a3po.rollout.workflow import Episode, Stage
from tests.rollout.test_producers import LengthScorer, engine_of
from tests.rollout.test_registrations import NOTHING, NearPlace
from tests.rollout.tiny import tiny_tokenizer
from tests.vllm_server import VllmServer

PROMPTS = [Prompt(i, f"{i}", f"{i}", np.array([2 + i, 12], np.int32)) for i in range(4)]


class Interrupted:
    """A workflow of two turns; between them the next version is published, and taken where it can be."""

    def __init__(self, engine: RolloutEngine, directory: Path, *, wait: bool) -> None:
        self.engine, self.directory, self.wait = engine, directory, wait
        self.publishing: asyncio.Task[int] | None = None
        self.training: list[Sample] = []

    async def __call__(self, episode: Episode) -> float:
        await episode.generate(max_tokens=8)
        if self.publishing is None:
            self.publishing = asyncio.create_task(self.engine.update_weights(1, self.directory))
            if self.wait:
                await self.publishing
            self.training = await self.engine.generate([SampleRequest(9, 0, episode.prompt.tokens, 8)])
        await episode.generate(max_tokens=8)
        return 1.0

    async def run(self) -> Evaluation:
        stage = Stage(self, tiny_tokenizer())
        return await evaluate(
            self.engine,
            LengthScorer(),  # type: ignore[arg-type]
            stage,
            PROMPTS,
            max_response_tokens=16,
            temperature=1.0,
        )


def versions_of(evaluation: Evaluation) -> set[int]:
    return {evaluation.version, evaluation.min_version, evaluation.max_version}


def test_the_local_engine_keeps_a_copy_between_turns_too(versions: list[Path]) -> None:
    async def run() -> tuple[list[Evaluation], Interrupted]:
        engine: LocalEngine = engine_of(versions[0])
        first = Interrupted(engine, versions[1], wait=True)
        found = [await first.run(), await Interrupted(engine, versions[2], wait=True).run()]
        await engine.close()
        return found, first

    (before, after), interrupted = asyncio.run(asyncio.wait_for(run(), 60))
    assert versions_of(before) == {0}
    assert versions_of(after) == {1}
    assert before.accuracy == 1.0
    assert set(interrupted.training[0].versions.tolist()) == {1}, "training has the new weights meanwhile"


def test_a_held_server_takes_new_weights_when_the_evaluation_is_over(tmp_path: Path) -> None:
    async def run(num_servers: int) -> None:
        places: list[Any] = [NearPlace(str(number)) for number in range(num_servers)]

        async def find() -> list[Any]:
            return places

        fleet = Fleet(find, 0, tmp_path, wanted=NOTHING, timeout_s=60)
        running = asyncio.create_task(fleet.run())
        while len(fleet.serving) < num_servers:
            await asyncio.sleep(0.01)
        async with fleet.hold() as version:
            held = await fleet.pick_held()
            publishing = asyncio.create_task(fleet.update(1, tmp_path))
            if num_servers > 1:
                assert await publishing == fleet.version == 1
                assert sorted(server.version or 0 for server in fleet.serving) == [
                    0,
                    *[1] * (num_servers - 1),
                ]
                for _ in range(3):
                    picked = await fleet.pick(held)
                    assert picked is not held, "it is behind: nothing to train on comes from it"
                    picked.tokens_in_flight += 10
            else:
                await asyncio.sleep(0.05)
                assert not publishing.done()
                assert await fleet.pick() is held, "training goes on with what there is"
            assert await fleet.pick_held() is held
            assert (version, held.version) == (0, 0)
        assert await publishing == 1
        assert {server.version for server in fleet.serving} == {1}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    for num_servers in (1, 3):
        asyncio.run(asyncio.wait_for(run(num_servers), 60))


def test_weights_wait_for_an_evaluation_only_so_long(tmp_path: Path) -> None:
    async def run() -> None:
        places: list[Any] = [NearPlace("one")]

        async def find() -> list[Any]:
            return places

        fleet = Fleet(find, 0, tmp_path, wanted=NOTHING, timeout_s=0.2)
        running = asyncio.create_task(fleet.run())
        async with fleet.hold():
            assert await fleet.update(1, tmp_path) == 1, "while the evaluation is still under way"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_real_server_answers_an_evaluation_with_one_version(vllm_server: VllmServer) -> None:
    async def run() -> tuple[Evaluation, Interrupted, int]:
        async with vllm_server.engine(eos=False, segment_tokens=4) as engine:
            interrupted = Interrupted(engine, vllm_server.versions[1], wait=False)
            evaluation = await interrupted.run()
            assert interrupted.publishing is not None
            return evaluation, interrupted, await interrupted.publishing

    evaluation, interrupted, served = asyncio.run(run())
    assert versions_of(evaluation) == {0}
    assert set(interrupted.training[0].versions.tolist()) == {0}, "the only server went on for training too"
    assert served == 1
