"""Servers that come and go while a run is under way, as `rollout.servers_file` names them; no server answers here."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.rollout.vllm.fleet import Fleet
from megatron_a3po.rollout.vllm.registrations import Registrations
from megatron_a3po.rollout.vllm.server import Server, Wanted
from megatron_a3po.rollout.vllm.wire import ServerError, Unreachable

NOTHING: Any = None
A, B, C = (f"http://10.0.0.{number}:8000" for number in range(3))


def registrations(path: Path) -> Registrations:
    def connect(url: str) -> Server:
        return Server(url, token=None, on_update="restart", timeout_s=1)

    return Registrations(path, connect, timeout_s=0.0)


def urls(found: Any) -> list[str]:
    return [str(place) for place in found]


def test_a_file_that_is_written_later_and_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "servers"
    looked_up = registrations(file)
    assert asyncio.run(looked_up.find()) == []
    file.write_text(f"{A}\n{B}\n")
    first = asyncio.run(looked_up.find())
    assert urls(first) == [A, B]
    file.write_text(f"{B}\nten.0.0.2\n{C}\n")
    with caplog.at_level(logging.WARNING):
        second = asyncio.run(looked_up.find())
        asyncio.run(looked_up.find())
    assert urls(second) == [B, C]
    assert second[0] is first[1], "a server that stays is the same"
    assert [record.message for record in caplog.records] == [
        f"rollout.servers_file: {file} has 'ten.0.0.2', which is no URL such as http://10.0.0.5:8000; it is left out"
    ]


def test_a_folder_with_a_file_for_each_server(tmp_path: Path) -> None:
    (tmp_path / "one.url").write_text(f"{A}\njob 7 attempt 2\n")
    (tmp_path / "two.url").write_text(B)
    (tmp_path / "two.tmp").write_text(C)
    (tmp_path / "empty.url").touch()
    looked_up = registrations(tmp_path)
    assert urls(asyncio.run(looked_up.find())) == [A, B]
    (tmp_path / "one.url").unlink()
    assert urls(asyncio.run(looked_up.find())) == [B]


def test_a_server_that_does_not_answer_is_asked_to_start_again(tmp_path: Path) -> None:
    (tmp_path / "one.url").write_text("http://127.0.0.1:9\n")  # nobody listens there

    async def run() -> None:
        (place,) = await registrations(tmp_path).find()
        with pytest.raises(Unreachable):
            await place.open()
        await place.close()

    asyncio.run(run())
    assert (tmp_path / "one.failed").exists()


class NearServer:
    """What a fleet asks of a server, here within the process."""

    def __init__(self, name: str) -> None:
        self.name, self.version, self.tokens_in_flight = name, None, 0
        self.is_staged, self.stall_s = True, 0.0
        self.unsuitable = False

    async def refuse_unsuitable(self, wanted: Wanted) -> None:
        if self.unsuitable:
            raise ServerError("another model")

    async def receive(self, source: dict[str, Any]) -> None: ...

    async def finish_update(self, version: int) -> None:
        self.version = version

    async def prove_answer(self) -> None: ...

    async def check_health(self) -> None: ...


class NearPlace:
    def __init__(self, name: str) -> None:
        self.server, self.closed = NearServer(name), False

    async def open(self) -> Any:
        return self.server

    def check(self) -> None: ...

    async def close(self) -> None:
        self.closed = True


def test_the_fleet_takes_newcomers_and_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_a3po.rollout.vllm.fleet.AGAIN_AFTER_S", 0.01)
    one, two, wrong = (NearPlace(name) for name in ("one", "two", "wrong"))
    wrong.server.unsuitable = True
    there: list[Any] = [one]

    async def find() -> list[Any]:
        return list(there)

    async def until(condition: Any) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)

    async def run() -> None:
        fleet = Fleet(find, 0, tmp_path, wanted=NOTHING, timeout_s=60)
        running = asyncio.create_task(fleet.run())
        await until(lambda: fleet.serving == [one.server])
        await fleet.update(1, tmp_path)

        there.extend([wrong, two])
        await until(lambda: len(fleet.serving) == 2)
        assert two.server.version == 1, "a newcomer has the newest weights before its first work"
        assert not running.done(), "one that cannot serve does not end a run that has servers"

        one.server.tokens_in_flight = 5
        there.remove(one)
        await until(lambda: fleet.serving == [two.server])
        assert await fleet.pick() is two.server
        await fleet.update(2, tmp_path)
        assert (one.server.version, two.server.version) == (1, 2)
        assert not one.closed, "it finishes what it has"
        one.server.tokens_in_flight = 0
        await until(lambda: one.closed)

        there.append(one)
        await until(lambda: len(fleet.serving) == 2)
        assert one.server.version == 2
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await fleet.close()
        assert one.closed
        assert two.closed

    asyncio.run(run())
