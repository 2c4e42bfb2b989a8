"""The engine's thread: updates between tokens, the evaluation lane, failures, the end."""

import asyncio
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.local import LocalEngine
from tests.rollout.test_decoder import TOLERANCE, plain_logps
from tests.rollout.tiny import tiny_model

LONG = 400
ENDLESS = 100_000  # tokens: longer than this process is ever kept from going on; closing ends it


def engine_of(directory: Path, version: int = 0) -> LocalEngine:
    return LocalEngine(
        directory, version=version, eos_token_ids=[], seed=1, max_concurrent_samples=8, device="cpu"
    )


def long_request(index: int = 0, *, greedy: bool = False, length: int = LONG) -> SampleRequest:
    return SampleRequest(index, 0, np.array([3, 12, 4, 13], np.int32), length, 1.0, greedy)


async def has_sampled(engine: LocalEngine, since: float = 0.0) -> None:
    """Until it has sampled something to train on."""
    while not engine.sampled_between(since, time.monotonic()):
        await asyncio.sleep(0.001)


def test_an_update_mid_response_has_an_exact_boundary(versions: list[Path]):
    async def run() -> Sample:
        engine = engine_of(versions[0])
        generating = asyncio.create_task(engine.generate([long_request(length=ENDLESS)]))
        await has_sampled(engine)
        assert await engine.update_weights(1, versions[1]) == engine.version == 1
        await has_sampled(engine, time.monotonic())
        await engine.close()
        (sample,) = await generating
        return sample

    sample = asyncio.run(run())
    boundary = int((sample.versions == 0).sum())
    assert 0 < boundary < len(sample.tokens)
    assert (np.diff(sample.versions) >= 0).all()
    old, new = (plain_logps(tiny_model(seed), long_request(), sample) for seed in (0, 1))
    np.testing.assert_allclose(sample.logps[:boundary], old[:boundary], atol=10 * TOLERANCE, rtol=0)
    np.testing.assert_allclose(sample.logps[boundary:], new[boundary:], atol=10 * TOLERANCE, rtol=0)


def test_the_newest_weights_win_and_never_an_older_one(versions: list[Path]):
    async def run() -> list[int]:
        engine = engine_of(versions[0])
        updates = [engine.update_weights(version, versions[version]) for version in (3, 1, 2)]
        in_use = await asyncio.gather(*updates)
        assert engine.version == 3
        assert await engine.update_weights(2, versions[2]) == 3
        await engine.close()
        return in_use

    assert all(in_use >= version for in_use, version in zip(asyncio.run(run()), (3, 1, 2)))


def test_an_evaluation_keeps_its_weights_and_pauses_nobody(versions: list[Path]):
    async def run() -> tuple[list[Sample], list[Sample], int]:
        engine = engine_of(versions[0])
        evaluation = asyncio.create_task(
            engine.generate([long_request(i, greedy=True, length=200) for i in range(10)])
        )
        training = asyncio.create_task(engine.generate([long_request(i, length=ENDLESS) for i in range(4)]))
        await has_sampled(engine)  # and so the evaluation has begun too
        await engine.update_weights(1, versions[1])
        updated = time.monotonic()
        evaluated = await evaluation
        sampled_meanwhile = engine.sampled_between(0, time.monotonic())
        await has_sampled(engine, updated)
        await engine.close()
        return await training, evaluated, sampled_meanwhile

    trained, evaluated, sampled_meanwhile = asyncio.run(run())
    assert {int(version) for sample in evaluated for version in sample.versions} == {0}
    assert {int(version) for sample in trained for version in sample.versions} == {0, 1}
    assert sampled_meanwhile > 100
    wanted = plain_logps(tiny_model(0), long_request(), evaluated[0])
    np.testing.assert_allclose(evaluated[0].logps, wanted, atol=10 * TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"missing \['model.norm.weight'\]"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"surplus \['extra'\]"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            r"norm.weight has shape \[3\].*\[32\]",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    versions: list[Path], tmp_path: Path, damage, message: str
):
    directory = tmp_path / "version-1"
    shutil.copytree(versions[1], directory)
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    async def run() -> None:
        engine = engine_of(versions[0])
        try:
            await engine.update_weights(1, directory)
        finally:
            assert engine.version == 0
            await engine.close()

    with pytest.raises(RolloutError, match=message):
        asyncio.run(run())


def test_what_ends_the_thread_reaches_everybody_who_waits(versions: list[Path]):
    async def run() -> list[BaseException | list[Sample] | None]:
        engine = engine_of(versions[0])
        wrong = SampleRequest(0, 0, np.array([999], np.int32), 5)
        waiting = [engine.generate([long_request()]), engine.generate([wrong]), engine.failed()]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(IndexError):
            await engine.generate([long_request()])
        await engine.close()
        return results

    assert [type(result) for result in asyncio.run(run())] == [IndexError] * 3


def test_closing_ends_what_is_unfinished_as_aborted(versions: list[Path]):
    async def run() -> Sample:
        engine = engine_of(versions[0])
        generating = asyncio.create_task(engine.generate([long_request(length=ENDLESS)]))
        await has_sampled(engine)
        await engine.close()
        (sample,) = await generating
        with pytest.raises(RolloutError, match="closed"):
            await engine.generate([long_request()])
        return sample

    sample = asyncio.run(run())
    assert sample.finish_reason == "abort"
    assert 0 < len(sample.tokens) < ENDLESS


def test_sampled_between_counts_the_tokens_of_an_interval(versions: list[Path]):
    async def run() -> tuple[int, int, int]:
        engine = engine_of(versions[0])
        start = time.monotonic()
        await engine.generate([long_request(i, length=10) for i in range(3)])
        middle = time.monotonic()
        await engine.generate([long_request(i, length=7) for i in range(20)])
        end = time.monotonic()
        await engine.close()
        return (
            engine.sampled_between(start, middle),
            engine.sampled_between(middle, end),
            engine.sampled_between(end, end + 9),
        )

    assert asyncio.run(run()) == (30, 140, 0)
