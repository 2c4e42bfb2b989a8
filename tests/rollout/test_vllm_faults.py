"""What a run makes of servers that fail, lie or are not what it needs: a fault-injecting proxy before a real vLLM.

Whatever goes wrong, the response must be that of an undisturbed server, token for token, and what was lost is counted.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a3po.errors import ConfigError, RolloutError, ServersGone
from megatron_a3po.rollout.engines.base import Sample
from megatron_a3po.rollout.vllm.places import GivenPlace
from megatron_a3po.rollout.vllm.server import Server
from tests.fault_proxy import Answer, Call, FaultProxy, Forward, Respond
from tests.rollout.test_vllm import TOLERANCE, distance, request
from tests.vllm_server import MAX_TOKENS, VllmServer

SEGMENT, LENGTH = 4, 12


def cut(num_bytes: int) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, num_sent=num_bytes)


def choice(change: Callable[[dict[str, Any]], object]) -> Callable[[Answer], Answer]:
    """The answer with its one choice changed."""

    def change_answer(body: dict[str, Any]) -> dict[str, Any]:
        change(body["choices"][0])
        return body

    return lambda answer: answer.with_json(change_answer)


FAULTS: dict[str, Callable[[Answer], Answer]] = {
    "dropped": cut(-1),
    "half sent": cut(40),
    "500": lambda _: Answer(500, b'{"error": "no"}'),
    "503": lambda _: Answer(503, b""),
    "no JSON": lambda answer: replace(answer, body=answer.body[:-1]),
    "another JSON": lambda _: Answer(200, b'["no"]'),
    "nothing": lambda _: Answer(200, b""),
    "fewer log-probs than tokens": choice(lambda one: one["logprobs"]["content"].pop()),
    "no log-probs": choice(lambda one: one.update(logprobs=None)),
    "no versions": choice(lambda one: one.update(weight_versions=None)),
    "a version never published": choice(lambda one: one["weight_versions"][0].update(version="1.7")),
    "fewer tokens than asked": choice(
        lambda one: (
            one["token_ids"].pop(),
            one["logprobs"]["content"].pop(),
            one["weight_versions"][-1].update(end=len(one["token_ids"])),
        )
    ),
    "another end": choice(lambda one: one.update(finish_reason="stop")),
}


class Saboteur:
    """Does `fault` to the answers of the generate calls that are due, and notes where each call went on from."""

    def __init__(self, fault: Callable[[Answer], Answer], due: Callable[[int], bool]) -> None:
        self.fault, self.due = fault, due
        self.begun_at: list[int] = []
        self.num_faults = 0

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        answer = await forward(call)
        if not call.generates or answer.status != 200:
            return answer
        self.begun_at.append(len(call.json["token_ids"]))
        if not self.due(len(self.begun_at)):
            return answer
        self.num_faults += 1
        return self.fault(answer)


def through(server: VllmServer, proxy: FaultProxy, *, timeout_s: float = 120.0) -> GivenPlace:
    def connect(url: str) -> Server:
        return Server(url, token=server.token, on_update="recompute_kv", timeout_s=timeout_s)

    return GivenPlace(proxy.url, connect, timeout_s=60)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.05)


def same(one: Sample, other: Sample) -> bool:
    return one.tokens.tolist() == other.tokens.tolist() and np.allclose(one.logps, other.logps, atol=1e-4)


def test_an_answer_that_cannot_be_trusted_is_not_used_and_asked_for_again(vllm_server: VllmServer):
    """The second segment's: the first is kept, and nothing of what is refused reaches the response."""
    one = request(3, LENGTH)

    async def run() -> None:
        async with FaultProxy(vllm_server.url) as proxy:
            places = [through(vllm_server, proxy)]
            async with vllm_server.engine(places=places, eos=False, segment_tokens=SEGMENT) as engine:
                (expected,) = await engine.generate([one])
                assert distance(vllm_server, one, expected).max() < TOLERANCE
                for name, fault in FAULTS.items():
                    proxy.respond = saboteur = Saboteur(fault, due=lambda number: number == 2)
                    (sample,) = await engine.generate([one])
                    assert same(sample, expected), name
                    assert saboteur.begun_at == [10, 14, 14, 18], name
                    assert engine.take_num_lost() == 1, name
                    assert len(engine._fleet.serving) == 1, f"{name}: an accident puts no server out"

    asyncio.run(run())


def test_a_server_that_keeps_failing_is_out_until_it_answers_again(vllm_server: VllmServer):
    """Three in a row are no accident. Its health check is well all the time; an answer lets it in again."""
    one = request(3, LENGTH)

    async def run() -> None:
        async with FaultProxy(vllm_server.url) as proxy:
            places = [through(vllm_server, proxy)]
            async with vllm_server.engine(places=places, eos=False, segment_tokens=SEGMENT) as engine:
                (expected,) = await engine.generate([one])
                proxy.respond = saboteur = Saboteur(FAULTS["no versions"], due=lambda number: number >= 2)
                generating = asyncio.create_task(engine.generate([one]))
                await until(lambda: not engine._fleet.serving and saboteur.num_faults > 3)
                assert engine.take_num_lost() == 3, "what it is let in by is no request of ours"
                proxy.respond = None
                (sample,) = await generating
                assert same(sample, expected)
                assert engine.take_num_lost() == 0

    asyncio.run(run())


def test_a_request_that_fails_wherever_it_goes_ends_the_run(vllm_server: VllmServer):
    """All others are answered, that by which a server is let in again among them."""

    async def sabotage(call: Call, forward: Forward) -> Answer:
        is_poison = call.generates and len(call.json["token_ids"]) > 1
        return Answer(500, b"") if is_poison else await forward(call)

    async def run() -> None:
        async with FaultProxy(vllm_server.url) as proxy:
            places = [through(vllm_server, proxy)]
            async with vllm_server.engine(places=places, eos=False) as engine:
                await engine.generate([request(0, 1)])
                proxy.respond = sabotage
                with pytest.raises(RolloutError, match=r"10 requests in a row for prompt 5 failed.*HTTP 500"):
                    await engine.generate([request(5, LENGTH)])

    asyncio.run(run())


def test_an_answer_that_never_comes_is_asked_for_elsewhere(vllm_server: VllmServer):
    requests = [request(index, LENGTH) for index in range(4)]

    async def run() -> None:
        never = asyncio.Event()

        async def hold(call: Call, forward: Forward) -> Answer:
            if call.generates:
                await never.wait()
            return await forward(call)

        async with FaultProxy(vllm_server.url) as proxy:
            slow = through(vllm_server, proxy, timeout_s=8.0)
            async with vllm_server.engine(places=[vllm_server.place(), slow], eos=False) as engine:
                await until(lambda: len(engine._fleet.serving) == 2)
                expected = await engine.generate(requests)
                engine.take_num_lost()
                proxy.respond = hold
                samples = await engine.generate(requests)
                assert all(map(same, samples, expected))
                assert engine.take_num_lost() >= 1
                assert [str(server) for server in engine._fleet.serving] == [vllm_server.url]
                never.set()

    asyncio.run(run())


def test_labels_stay_when_the_answer_comes_two_updates_later(vllm_server: VllmServer):
    one = request(2, LENGTH)

    async def run() -> Sample:
        generated, updated = asyncio.Event(), asyncio.Event()

        async def delay(call: Call, forward: Forward) -> Answer:
            answer = await forward(call)
            if call.generates:
                generated.set()
                await updated.wait()
            return answer

        async with FaultProxy(vllm_server.url) as proxy:
            places = [through(vllm_server, proxy)]
            async with vllm_server.engine(places=places, eos=False) as engine:
                await engine.update_weights(1, vllm_server.versions[1])
                await engine.generate([request(0, 1)])
                proxy.respond = delay
                generating = asyncio.create_task(engine.generate([one]))
                await generated.wait()
                for version in (2, 3):
                    assert await engine.update_weights(version, vllm_server.versions[version % 3]) == version
                updated.set()
                (sample,) = await generating
                assert engine.version == 3
                return sample

    sample = asyncio.run(run())
    assert (sample.versions == 1).all()
    assert distance(vllm_server, one, sample).max() < TOLERANCE


def without_route(route: str) -> Callable[[Call, Answer], Answer]:
    def change(call: Call, answer: Answer) -> Answer:
        def drop(body: Any) -> Any:
            del body["paths"][route]
            return body

        return answer.with_json(drop) if call.path == "/openapi.json" else answer

    return change


def answering(path: str, text: str, status: int = 200) -> Callable[[Call, Answer], Answer]:
    return lambda call, answer: Answer(status, text.encode()) if call.path == path else answer


REFUSALS: dict[str, tuple[Callable[[Call, Answer], Answer], str]] = {
    "too old": (answering("/version", '{"version": "0.31.2"}'), r"is vLLM 0\.31\.2, .* needs vLLM >= 0\.32"),
    "no token route": (without_route("/inference/v1/generate"), "--enable-scale-out"),
    "no update routes": (without_route("/start_weight_update"), "VLLM_SERVER_DEV_MODE=1"),
    "no dev mode": (answering("/server_info?config_format=json", "", 404), "VLLM_SERVER_DEV_MODE=1"),
    "no vLLM": (answering("/version", "hello", 404), "vLLM's API server"),
}


def refusal(
    server: VllmServer,
    change: Callable[[Call, Answer], Answer] = lambda _, answer: answer,
    *,
    error: type[Exception] = ConfigError,
    token: str | None = None,
    **options: Any,
) -> str:
    """The one sentence with which a run refuses a server."""

    async def respond(call: Call, forward: Forward) -> Answer:
        return change(call, await forward(call))

    async def run() -> str:
        async with FaultProxy(server.url) as proxy:
            proxy.respond = respond

            def connect(url: str) -> Server:
                given = server.token if token is None else token
                return Server(url, token=given, on_update="recompute_kv", timeout_s=60)

            places = [GivenPlace(proxy.url, connect, timeout_s=60)]
            async with server.engine(places=places, fails=True, **options) as engine:
                with pytest.raises(error) as caught:
                    await engine.failed()
            assert proxy.url in str(caught.value)
            return str(caught.value)

    sentence = asyncio.run(run())
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_server_that_lacks_something_is_refused_with_what_it_needs(vllm_server: VllmServer, kind: str):
    change, words = REFUSALS[kind]
    assert re.search(words, refusal(vllm_server, change))


def test_a_server_of_another_model_is_refused_before_it_is_touched(vllm_server: VllmServer, tmp_path: Path):
    wanted = vllm_server.wanted
    larger = replace(wanted, shape=replace(wanted.shape, vocab_size=96))
    assert "vocab_size 64 instead of 96" in refusal(vllm_server, wanted=larger)
    deeper = replace(wanted, shape=replace(wanted.shape, num_layers=3))
    sentence = refusal(vllm_server, wanted=deeper)
    assert "num_layers 2 instead of 3" in sentence
    assert str(vllm_server.versions[0]) in sentence
    longer = replace(wanted, max_tokens=MAX_TOKENS + 1)
    assert f"--max-model-len {MAX_TOKENS + 1}" in refusal(vllm_server, wanted=longer)
    assert "--dtype bfloat16" in refusal(vllm_server, wanted=replace(wanted, dtype="bfloat16"))
    assert "rollout.token_file" in refusal(vllm_server, token="of somebody else")


def test_a_server_that_answers_nonsense_cannot_serve(vllm_server: VllmServer):
    """What it says of itself is right; what it answers with decides."""

    def change(call: Call, answer: Answer) -> Answer:
        is_answer = call.generates and answer.status == 200
        return FAULTS["no versions"](answer) if is_answer else answer

    sentence = refusal(vllm_server, change, error=RolloutError)
    assert "does not say which weight version produced which token: vLLM >= 0.32 does" in sentence


def test_control_routes_that_answer_without_a_token_are_warned_of(
    vllm_server: VllmServer, caplog: pytest.LogCaptureFixture
):
    async def adds_the_token(call: Call, forward: Forward) -> Answer:
        bearer = {"authorization": f"Bearer {vllm_server.token}"}
        return await forward(replace(call, headers=call.headers | bearer))

    async def run(respond: Respond | None) -> str:
        caplog.clear()
        async with FaultProxy(vllm_server.url) as proxy:
            proxy.respond = respond
            async with vllm_server.engine(places=[through(vllm_server, proxy)]) as engine:
                await until(lambda: bool(engine._fleet.serving))
        return caplog.text

    with caplog.at_level(logging.WARNING):
        assert "answer without a token: whoever reaches it can change its weights" in asyncio.run(
            run(adds_the_token)
        )
        assert "without a token" not in asyncio.run(run(None))


def test_without_any_server_generation_waits_and_then_says_what_the_trouble_was(vllm_server: VllmServer):
    one = request(3, LENGTH)

    async def run() -> None:
        async with FaultProxy(vllm_server.url) as proxy:
            places = [through(vllm_server, proxy)]
            options: dict[str, Any] = {"eos": False, "fails": True, "timeout_s": 10.0}
            async with vllm_server.engine(places=places, **options) as engine:
                await engine.generate([request(0, 1)])
                await proxy.cut()
                generating = asyncio.create_task(engine.generate([one]))
                with pytest.raises(ServersGone, match=r"for 10 s \(rollout.server_timeout_s\): .*failed: "):
                    await engine.failed()
                assert not generating.done()

    asyncio.run(run())
