"""A real server takes orders of the newest attempt at a run. A whole run that finds itself fenced off by its server:
tests/trainer/test_attempts_and_servers.py."""

import asyncio

import pytest

from megatron_a3po.errors import FencedError
from megatron_a3po.rollout.vllm.places import GivenPlace
from megatron_a3po.rollout.vllm.server import Server
from tests.vllm_server import VllmServer


def test_a_lower_attempt_cannot_disturb_an_update_of_a_higher(vllm_server: VllmServer) -> None:
    def attempt(number: int, run: str = "a run") -> Server:
        return Server(
            vllm_server.url,
            token=vllm_server.token,
            on_update="recompute_kv",
            timeout_s=120,
            run=run,
            attempt=number,
        )

    old, new, another_run = (str(directory) for directory in vllm_server.versions)

    async def run() -> None:
        lower, higher, other = attempt(2), attempt(3), attempt(1, "another run")
        await lower.check_health()
        await higher.refuse_unsuitable(vllm_server.wanted)
        await higher.begin_update()
        for order in (
            lower.begin_update(),
            lower.receive({"directory": old}),
            lower.finish_update(7),
            lower.check_health(),
        ):
            with pytest.raises(FencedError, match=r"attempt 2 is fenced off: .* takes orders of attempt 3"):
                await order
        await higher.receive({"directory": new})
        await higher.finish_update(1)
        assert await higher.label() == "3.1"
        await higher.prove_answer()

        places = [GivenPlace(vllm_server.url, lambda url: attempt(2), timeout_s=60)]
        async with vllm_server.engine(places=places, fails=True) as engine:
            with pytest.raises(FencedError):
                await engine.failed()

        await other.begin_update()  # each run counts its own attempts
        await other.receive({"directory": another_run})
        await other.finish_update(2)
        assert await other.label() == "1.2"
        for server in (lower, higher, other):
            await server.close()

    asyncio.run(run())
