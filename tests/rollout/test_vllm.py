"""The engine over a real vLLM server: tokens, log-probs, versions, and what is left of them when things go wrong.

References are plain forwards of transformers in fp32 over the same tokens, with the weights the labels name. The three
versions have nothing in common, so a wrong label, a stale cache or a weight that was not taken is off by whole nats.
"""

import asyncio
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch

from megatron_a3po.errors import RolloutError
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.vllm import VllmEngine
from megatron_a3po.rollout.vllm.places import new_token_file
from tests.vllm_server import EOS_ID, MAX_TOKENS, ROOT, VllmServer, read_model

TOLERANCE = 1e-4
TEMPERATURE = 0.8
PROMPT = np.arange(2, 12, dtype=np.int32)
LONG = MAX_TOKENS - len(PROMPT)


def request(index: int, length: int = LONG, sample: int = 0) -> SampleRequest:
    prompt = np.roll(PROMPT, index).astype(np.int32)
    return SampleRequest(index, sample, prompt, length, TEMPERATURE)


def distance(server: VllmServer, one: SampleRequest, sample: Sample) -> np.ndarray:
    """|log-prob - that of a plain forward under the version the token is labelled with|, by token."""
    ids = torch.from_numpy(np.concatenate([one.prompt_tokens, sample.tokens])).long()[None]
    targets = ids[0, len(one.prompt_tokens) :, None]
    found = np.full(len(sample.tokens), np.nan)
    for version in np.unique(sample.versions):
        with torch.no_grad():
            logits = read_model(server.versions[version % 3])(ids).logits[0, len(one.prompt_tokens) - 1 : -1]
        logps = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, targets)[:, 0].numpy()
        here = sample.versions == version
        found[here] = np.abs(logps - sample.logps)[here]
    return found


def boundaries(sample: Sample) -> int:
    return int((np.diff(sample.versions) != 0).sum())


async def updated_under_way(
    engine: VllmEngine, server: VllmServer
) -> tuple[list[SampleRequest], list[Sample]]:
    """Four long responses that an update to the next version reaches half-way, in the end whole responses again."""
    requests = [request(index) for index in range(4)]
    loop = asyncio.get_running_loop()
    await engine.generate(requests)  # the first steps of a server are slow
    begun = loop.time()
    await engine.generate(requests)
    duration = loop.time() - begun
    for version in range(engine.version + 1, engine.version + 6):
        generating = asyncio.create_task(engine.generate(requests))
        await asyncio.sleep(duration / 3)
        assert await engine.update_weights(version, server.versions[version % 3]) == version
        samples = await generating
        if any(boundaries(sample) for sample in samples) or len({*map(len, (s.tokens for s in samples))}) > 1:
            return requests, samples
    pytest.fail("no update reached a response under way")


def test_tokens_and_log_probs_are_of_the_distribution_that_is_trained(vllm_server: VllmServer):
    requests = [request(index, 60, sample) for index in range(4) for sample in range(2)]

    async def run():
        async with vllm_server.engine(segment_tokens=16) as engine:
            first = await engine.generate(requests)
            return first, await engine.generate(requests)

    first, again = asyncio.run(run())
    for one, sample, same in zip(requests, first, again):
        assert distance(vllm_server, one, sample).max() < TOLERANCE
        assert (sample.versions == 0).all()
        # The end of a response is a trained token of its own.
        assert (sample.tokens[-1] == EOS_ID) == (sample.finish_reason == "stop")
        assert EOS_ID not in sample.tokens[:-1]
        assert len(sample.tokens) == 60 or sample.finish_reason == "stop"
        assert (sample.tokens == same.tokens).all(), "random numbers are a function of (seed, prompt, sample)"
    assert {sample.finish_reason for sample in first} <= {"stop", "length"}
    assert not np.array_equal(first[0].tokens[:10], first[1].tokens[:10]), "samples of a prompt differ"


def test_after_an_update_under_way_tokens_are_of_the_new_weights_on_a_plain_forward(vllm_server: VllmServer):
    async def run():
        async with vllm_server.engine(eos=False) as engine:
            return await updated_under_way(engine, vllm_server)

    requests, samples = asyncio.run(run())
    assert max(map(boundaries, samples)) == 1
    for one, sample in zip(requests, samples):
        assert len(sample.tokens) == LONG
        assert distance(vllm_server, one, sample).max() < TOLERANCE


def test_kept_caches_are_those_of_the_old_weights(vllm_server: VllmServer):
    """The first new token is predicted by new weights from the last old token, over a cache of the old weights."""

    async def run():
        async with vllm_server.engine(on_update="keep_kv", eos=False) as engine:
            return await updated_under_way(engine, vllm_server)

    requests, samples = asyncio.run(run())
    mixed = [(one, sample) for one, sample in zip(requests, samples) if boundaries(sample)]
    assert mixed
    for one, sample in mixed:
        boundary = int(np.argmax(np.diff(sample.versions))) + 1
        old, new = (read_model(vllm_server.versions[sample.versions[i] % 3]) for i in (0, -1))
        ids = torch.from_numpy(np.concatenate([one.prompt_tokens, sample.tokens])).long()[None]
        cached = len(one.prompt_tokens) + boundary - 1
        with torch.no_grad():
            cache = old(ids[:, :cached], use_cache=True).past_key_values
            logits = new(ids[:, cached:-1], past_key_values=cache).logits[0]
        logps = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, ids[0, cached + 1 :, None])[:, 0]
        assert np.abs(logps.numpy() - sample.logps[boundary:]).max() < TOLERANCE
        plain = distance(vllm_server, one, sample)
        assert plain[:boundary].max() < TOLERANCE
        assert plain[boundary:].max() > 0.1, "its mismatch at equal versions is not zero"


def test_a_restarted_response_is_of_one_version(vllm_server: VllmServer):
    requests = [request(index) for index in range(4)]

    async def run() -> Sequence[Sample]:
        async with vllm_server.engine(on_update="restart", eos=False, segment_tokens=100) as engine:
            await engine.generate(requests)
            begun = time.monotonic()
            await engine.generate(requests)
            duration = time.monotonic() - begun
            for version in range(1, 6):
                begun = time.monotonic()
                generating = asyncio.create_task(engine.generate(requests))
                await asyncio.sleep(duration / 3)
                await engine.update_weights(version, vllm_server.versions[version % 3])
                samples = await generating
                generated = sum(span.details["tokens"] for span in engine.spans(begun, time.monotonic()))
                if generated > 4 * LONG:  # what the update reached was thrown away
                    return samples
            return pytest.fail("no update reached a response under way")

    samples = asyncio.run(run())
    for one, sample in zip(requests, samples):
        assert boundaries(sample) == 0
        assert len(sample.tokens) == LONG
        assert distance(vllm_server, one, sample).max() < TOLERANCE


def test_a_prefix_in_the_cache_of_old_weights_is_not_taken_for_one_of_the_new(vllm_server: VllmServer):
    """The same long prompt after an update that keeps the caches: what is cached of it has another salt."""
    prompt = np.resize(PROMPT, 300).astype(np.int32)  # longer than a block of the cache

    async def run() -> list[tuple[SampleRequest, Sample]]:
        async with vllm_server.engine(on_update="keep_kv", eos=False) as engine:
            answers = []
            for version in range(3):
                await engine.update_weights(version, vllm_server.versions[version])
                one = SampleRequest(0, version, prompt, 20, TEMPERATURE)
                answers.append((one, (await engine.generate([one]))[0]))
            return answers

    for version, (one, sample) in enumerate(asyncio.run(run())):
        assert (sample.versions == version).all()
        assert distance(vllm_server, one, sample).max() < TOLERANCE


def test_no_label_is_wrong_through_many_updates_under_load(vllm_server: VllmServer):
    async def run():
        async with vllm_server.engine(eos=False, segment_tokens=64) as engine:
            await engine.generate([request(0, 4)])
            samples: list[tuple[SampleRequest, Sample]] = []
            updating = True

            async def load(index: int) -> None:
                while updating:
                    one = request(index, 150)
                    (sample,) = await engine.generate([one])
                    samples.append((one, sample))

            loads = [asyncio.create_task(load(index)) for index in range(8)]
            for version in range(1, 21):
                await asyncio.sleep(0.15)
                assert await engine.update_weights(version, vllm_server.versions[version % 3]) == version
            updating = False
            await asyncio.gather(*loads)
            return samples

    samples = asyncio.run(run())
    assert sum(boundaries(sample) for _, sample in samples) > 10
    assert max(int(sample.versions.max()) for _, sample in samples) == 20
    for one, sample in samples:
        assert (np.diff(sample.versions) >= 0).all()
        assert distance(vllm_server, one, sample).max() < TOLERANCE


def test_greedy_tokens_are_the_likeliest(vllm_server: VllmServer):
    async def run():
        async with vllm_server.engine() as engine:
            greedy = SampleRequest(0, 0, PROMPT, 20, TEMPERATURE, greedy=True)
            return await engine.generate([greedy])

    (sample,) = asyncio.run(run())
    ids = torch.from_numpy(np.concatenate([PROMPT, sample.tokens])).long()[None]
    with torch.no_grad():
        logits = read_model(vllm_server.versions[0])(ids).logits[0, len(PROMPT) - 1 : -1]
    assert logits.argmax(-1).tolist() == sample.tokens.tolist()


def test_every_route_asks_for_the_token(vllm_server: VllmServer):
    async def run():
        bearer = {"Authorization": f"Bearer {vllm_server.token}"}
        async with httpx2.AsyncClient(base_url=vllm_server.url, trust_env=False, timeout=30) as http:
            paths = (await http.get("/openapi.json", headers=bearer)).json()["paths"]
            routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
            routes += [
                ("GET", path) for path in ("/openapi.json", "/docs", "/redoc", "/metrics", "/", "/no/such")
            ]
            routes += [("OPTIONS", "/pause"), ("HEAD", "/health"), ("POST", "//pause"), ("POST", "/pause/")]
            wrong = (
                {},
                {"Authorization": ""},
                {"Authorization": "Bearer"},
                {"Authorization": f"Bearer {vllm_server.token}x"},
                {"Authorization": f"Basic {vllm_server.token}"},
                {"X-Api-Key": vllm_server.token},
            )
            refused = [
                (method, path, (await http.request(method, path, headers=headers)).status_code)
                for method, path in routes
                for headers in wrong
            ]
            paused = (await http.get("/is_paused", headers=bearer)).json()
            return routes, refused, paused

    routes, refused, paused = asyncio.run(run())
    assert len(routes) > 40
    assert {("POST", "/pause"), ("POST", "/update_weights"), ("POST", "/inference/v1/generate")} <= set(
        routes
    )
    assert [one for one in refused if one[2] != 401] == []
    assert paused == {"is_paused": False}


def test_the_token_is_its_owners_alone(tmp_path: Path):
    token = new_token_file(tmp_path / "run" / "vllm.token")
    assert stat.S_IMODE((tmp_path / "run" / "vllm.token").stat().st_mode) == 0o600
    assert len(token) >= 32
    assert new_token_file(tmp_path / "run" / "vllm.token") != token


def test_a_lost_connection_loses_neither_prompt_nor_confirmed_segment(vllm_server: VllmServer):
    """Two ways to the server, one through a proxy that is cut while answers are under way and then stays dead."""

    async def run():
        upstream = vllm_server.url.rsplit(":", 1)[1]
        pipes: set[asyncio.StreamWriter] = set()

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", int(upstream))
            pipes.update((writer, back))
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

        proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        places = [vllm_server.place(), vllm_server.place(url=f"http://127.0.0.1:{port}")]
        async with vllm_server.engine(places=places, eos=False, segment_tokens=40) as engine:
            while len(engine._fleet.serving) < 2:
                await asyncio.sleep(0.1)
            requests = [request(index, 200) for index in range(12)]
            whole = await engine.generate(requests)
            (cut,) = (server for server in engine._fleet.serving if server.url.endswith(f":{port}"))
            generating = asyncio.create_task(engine.generate(requests))
            while not cut.tokens_in_flight:
                await asyncio.sleep(0)
            proxy.close()
            for pipe in pipes:
                pipe.close()
            samples = await generating
            return requests, whole, samples, engine.take_num_lost()

    requests, whole, samples, num_lost = asyncio.run(run())
    assert num_lost > 0
    for one, expected, sample in zip(requests, whole, samples):
        assert sample.tokens.tolist() == expected.tokens.tolist()
        assert distance(vllm_server, one, sample).max() < TOLERANCE


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def test_an_update_that_was_begun_and_never_ended_is_no_hindrance(vllm_server: VllmServer):
    """As a trainer leaves it that is killed meanwhile. Some times over: the server ends a connection that it has
    answered an error on, sooner or later."""

    async def run():
        samples: list[Sample] = []
        for _ in range(5):
            abandoned = vllm_server.connect(vllm_server.url)
            await abandoned.begin_update()
            await abandoned.close()
            async with vllm_server.engine() as engine:
                samples += await engine.generate([request(0, 8)])
        return samples

    for sample in asyncio.run(run()):
        assert distance(vllm_server, request(0, 8), sample).max() < TOLERANCE


def test_a_server_ends_with_the_process_that_launched_it(vllm_server: VllmServer, tmp_path: Path):
    log = tmp_path / "vllm.log"
    code = f"""
import asyncio
from pathlib import PosixPath
from megatron_a3po.rollout.vllm.places import Launch, LaunchedPlace
from megatron_a3po.rollout.vllm.server import Server

def connect(url):
    return Server(url, token=None, on_update="restart", timeout_s=5)

place = LaunchedPlace({vllm_server.launch!r}, {log!r}, connect)

async def run():
    opening = asyncio.create_task(place.open())
    while place.pid is None:
        await asyncio.sleep(0.01)
    print(place.pid, flush=True)
    await opening

asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        wait_until(lambda: log.is_file() and log.stat().st_size > 0, "vLLM has begun")
        assert session_of(server)
        parent.kill()
    wait_until(lambda: not session_of(server), "the server is gone")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)


def session_of(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = process.joinpath("stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(process.name))
    return found


def test_a_model_of_another_shape_ends_the_run(vllm_server: VllmServer, tmp_path: Path):
    """The server is none the worse for it."""
    other = read_model(vllm_server.versions[0])
    other.resize_token_embeddings(48, mean_resizing=False)
    other.save_pretrained(tmp_path / "other")

    async def run():
        async with vllm_server.engine(directory=tmp_path / "other", fails=True) as engine:
            with pytest.raises(RolloutError, match="cannot serve the model"):
                await engine.failed()
        async with vllm_server.engine() as engine:
            return await engine.generate([request(0, 8)])

    (sample,) = asyncio.run(run())
    assert distance(vllm_server, request(0, 8), sample).max() < TOLERANCE
