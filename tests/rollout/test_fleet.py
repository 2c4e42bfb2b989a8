"""Which vLLM server gets work, and what becomes of the others' work and of the run where one is slow, broken or wrong.

The servers are stand-ins: how slowly they answer is the point, what they answer is not.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.config import load_config
from megatron_a3po.errors import ConfigError, ServersGone
from megatron_a3po.rollout.prompts import Prompt
from megatron_a3po.rollout.sampler import GroupSampler
from megatron_a3po.rollout.statistics import RolloutCounters
from megatron_a3po.rollout.vllm import fleet, updates
from megatron_a3po.rollout.vllm.configured import refuse_unsuitable_servers
from megatron_a3po.rollout.workflow import Stage, single_turn
from tests.rollout.stand_in_server import Servers, StandInServer, request
from tests.rollout.test_producers import LengthScorer
from tests.rollout.tiny import tiny_tokenizer
from tests.run_files import write_model, write_run

GROUP = 4


def run(
    folder: Path, number: int, work: Callable[[Servers], Awaitable[None]], timeout_s: float = 4.0
) -> None:
    async def all_of_it() -> None:
        servers = Servers(folder, timeout_s)
        await servers.start(number)
        try:
            await asyncio.wait_for(work(servers), 100)
        finally:
            await servers.close()

    asyncio.run(all_of_it())


async def fails(servers: Servers, only: StandInServer, gone_s: float) -> None:
    """Raises what the engine over this one server ends with."""
    servers.begin([only], gone_s)
    try:
        await servers.engine.failed()
    finally:
        await servers.close()


def sampler_of(servers: Servers) -> GroupSampler:
    stage = Stage(single_turn, tiny_tokenizer())
    return GroupSampler(servers.engine, LengthScorer(), stage, RolloutCounters(), GROUP, 24, 1.0)  # type: ignore[arg-type]


def prompt(index: int) -> Prompt:
    return Prompt(index, f"{index}", "", np.array([2], np.int32))


def test_a_server_that_hangs_loses_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Requests begun at different moments time out at different moments, the later ones on a server that is already
    out and being looked after."""
    monkeypatch.setattr(fleet, "AGAIN_AFTER_S", 0.1)

    async def work(servers: Servers) -> None:
        servers.servers[0].answer_s = lambda: 1000.0
        sampler = sampler_of(servers)
        early = [asyncio.create_task(sampler.sample([prompt(index)])) for index in range(4)]
        await asyncio.sleep(2.0)
        late = [asyncio.create_task(sampler.sample([prompt(index)])) for index in range(4, 8)]
        for (group,) in await asyncio.gather(*early, *late):
            assert group is not None
            assert [len(one.tokens) for one in group.trajectories] == [1 + 24] * GROUP
        assert servers.engine.take_num_lost() > GROUP

    run(tmp_path, 2, work)


def test_a_server_that_hangs_in_an_update_holds_no_other_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """With requests under way everywhere, which a server that stands still does not answer."""
    monkeypatch.setattr(updates, "GRACE_S", 1.0)

    async def work(servers: Servers) -> None:
        hung, *others = servers.servers
        sampler = sampler_of(servers)
        hung.hanging.add("/update_weights")
        groups = [asyncio.create_task(sampler.sample([prompt(index)])) for index in range(9)]
        assert await servers.engine.update_weights(1, tmp_path) == 1
        assert [one.url for one in servers.fleet.serving] == [one.url for one in others]
        assert all(group is not None for (group,) in await asyncio.gather(*groups))

    run(tmp_path, 3, work, timeout_s=1000.0)
    assert caplog.text.count("is out") == 1


def test_an_error_of_the_engine_is_not_the_workflows(tmp_path: Path):
    async def work(servers: Servers) -> None:
        async def breaks(requests: object) -> list[object]:
            raise OSError("the engine broke")

        servers.engine.generate = breaks  # type: ignore[method-assign]
        with pytest.raises(OSError, match="the engine broke"):
            await sampler_of(servers).sample([prompt(0)])

    run(tmp_path, 1, work)


def test_a_group_shares_a_server_and_groups_share_the_servers(tmp_path: Path):
    async def work(servers: Servers) -> None:
        for server in servers.servers:
            server.answer_s = lambda: 2.0
        asked = [request(prompt, sample) for prompt in range(4) for sample in range(GROUP)]
        groups = [
            asyncio.create_task(servers.engine.generate(asked[at : at + GROUP])) for at in range(0, 16, GROUP)
        ]
        await servers.until(lambda: sum(one.tokens_in_flight for one in servers.fleet.serving) == 16 * 10)
        assert [one.tokens_in_flight for one in servers.fleet.serving] == [GROUP * 10] * 4
        busiest, *others = servers.fleet.serving
        busiest.tokens_in_flight += 1000
        assert await servers.fleet.pick(near=busiest, num_tokens=GROUP * 10) in others
        others[1].tokens_in_flight -= 5
        assert await servers.fleet.pick() is others[1]
        assert await servers.fleet.pick(near=others[0], num_tokens=GROUP * 10) is others[0]
        busiest.tokens_in_flight -= 1000
        others[1].tokens_in_flight += 5
        await asyncio.gather(*groups)

    run(tmp_path, 4, work)


def test_a_connection_that_breaks_at_a_return_is_no_refusal(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def work(servers: Servers) -> None:
        first, _ = servers.servers
        first.hanging.add("/health")
        out = next(one for one in servers.fleet.serving if one.url == first.url)
        await servers.fleet.evict(out, ConnectionError("gone"))  # type: ignore[arg-type]
        first.broken["/openapi.json"] = 1
        first.hanging.clear()
        await servers.until(lambda: len(servers.fleet.serving) == 2)
        assert first.broken["/openapi.json"] == 0

    run(tmp_path, 2, work)
    assert "left out" not in caplog.text


def test_a_server_that_was_refused_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(fleet, "AGAIN_AFTER_S", 0.1)
    monkeypatch.setattr(fleet, "AGAIN_AFTER_REFUSAL_S", 0.1)

    async def work(servers: Servers) -> None:
        first, _ = servers.servers
        first.version = "0.31.0"
        out = next(one for one in servers.fleet.serving if one.url == first.url)
        await servers.fleet.evict(out, ConnectionError("gone"))  # type: ignore[arg-type]
        asked = first.asked.count("/version")
        await servers.until(lambda: first.asked.count("/version") > asked + 3)
        assert len(servers.fleet.serving) == 1
        first.version = "0.32.0"
        await servers.until(lambda: len(servers.fleet.serving) == 2)

    run(tmp_path, 2, work)
    assert caplog.text.count("it needs vLLM >= 0.32") == 1  # said once


def test_who_waits_for_a_server_is_told_why(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A wrong port: named at once in the log, and at the end with the address and the reason."""

    async def all_of_it() -> None:
        servers = Servers(tmp_path, timeout_s=1.0)
        absent = StandInServer(servers.model)
        absent.url = "http://127.0.0.1:9"
        await fails(servers, absent, gone_s=3.0)

    with pytest.raises(ServersGone, match=r"for 3 s .*: http://127.0.0.1:9: .*connect"):
        asyncio.run(all_of_it())
    assert "waiting for the vLLM server http://127.0.0.1:9: GET /health failed" in caplog.text


def test_given_servers_are_looked_at_before_the_run_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def all_of_it() -> None:
        old = await StandInServer(write_model(tmp_path / "model")).start()
        old.version = "0.31.0"
        try:
            servers = [f"rollout.servers=[{url}]" for url in (old.url, "http://127.0.0.1:9")]
            right, absent = (
                load_config(run_file, ["rollout.engine=vllm", one], check_files=False) for one in servers
            )
            await asyncio.to_thread(refuse_unsuitable_servers, absent)
            assert "http://127.0.0.1:9 does not answer yet; it is waited for later" in caplog.text
            with pytest.raises(ConfigError, match=r"is vLLM 0\.31\.0, which does not say"):
                await asyncio.to_thread(refuse_unsuitable_servers, right)
            old.version = "0.32.0"
            await asyncio.to_thread(refuse_unsuitable_servers, right)
        finally:
            await old.close()

    run_file = write_run(tmp_path)
    asyncio.run(all_of_it())


def test_what_is_no_vllm_server_is_refused(tmp_path: Path):
    async def all_of_it() -> None:
        servers = Servers(tmp_path, timeout_s=1.0)
        other = await StandInServer(servers.model).start()
        other.missing.add("/health")
        await fails(servers, other, gone_s=60.0)

    with pytest.raises(ConfigError, match=r"is no vLLM server: GET /health gave HTTP 404"):
        asyncio.run(all_of_it())
