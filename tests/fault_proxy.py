"""A small HTTP proxy between an engine and a real vLLM server, which does to a request or an answer what a test asks.

`respond` decides: it gets every call and a function that passes it on to the server. Without one all calls are passed
on. It speaks as much HTTP/1.1 as the engine's client: bodies with a length, connections that stay open.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from megatron_a3po.rollout.vllm.wire import GENERATE

PASSED_ON = ("authorization", "content-type")


@dataclass(frozen=True)
class Call:
    method: str
    path: str  # with its query
    headers: dict[str, str]
    body: bytes

    @property
    def generates(self) -> bool:
        return self.path == GENERATE

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    num_sent: int | None = (
        None  # the connection breaks after so many bytes of the body; -1: before any header
    )

    def with_json(self, change: Callable[[Any], Any]) -> "Answer":
        return replace(self, body=json.dumps(change(json.loads(self.body))).encode())


Forward = Callable[[Call], Awaitable[Answer]]
Respond = Callable[[Call, Forward], Awaitable[Answer]]


class FaultProxy:
    """`async with` it inside the event loop of the engine, or `running` beside a process that has its own."""

    def __init__(self, upstream: str) -> None:
        self.respond: Respond | None = None
        self._upstream = upstream
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> "FaultProxy":
        self._http = httpx2.AsyncClient(base_url=self._upstream, timeout=None, trust_env=False)
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        await self._http.aclose()

    async def open(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """From now on nobody is there: what is under way is never answered, and nothing listens."""
        for (
            listening
        ) in self._server.sockets:  # a forked command has a copy, so that closing it is not enough
            listening.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    call = await _read(reader)
                    answer = await (self.respond or _pass)(call, self._forward)
                    await _write(writer, answer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _forward(self, call: Call) -> Answer:
        headers = {name: value for name, value in call.headers.items() if name in PASSED_ON}
        headers["connection"] = "close"  # the server ends one on which it answered an error, sooner or later
        answer = await self._http.request(call.method, call.path, headers=headers, content=call.body)
        return Answer(answer.status_code, answer.content)


async def _pass(call: Call, forward: Forward) -> Answer:
    return await forward(call)


async def _read(reader: asyncio.StreamReader) -> Call:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    pairs = (line.split(": ", 1) for line in lines if line)
    headers = {name.lower(): value for name, value in pairs}
    return Call(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    head = (
        f"HTTP/1.1 {answer.status} -\r\ncontent-type: application/json\r\n"
        f"content-length: {len(answer.body)}\r\n\r\n"
    )
    if answer.num_sent is None:
        writer.write(head.encode() + answer.body)
        await writer.drain()
        return
    if answer.num_sent >= 0:
        writer.write(head.encode() + answer.body[: answer.num_sent])
        await writer.drain()
        writer.close()  # what was written still arrives
        await writer.wait_closed()
    raise ConnectionError("broken on purpose")


@contextmanager
def running(proxy: FaultProxy) -> Iterator[Callable[[Callable[[], Awaitable[None]]], None]]:
    """The proxy in a thread; what is given calls a method of it there: `call(proxy.cut)`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault proxy", daemon=True)
    thread.start()

    def call(method: Callable[[], Awaitable[Any]]) -> None:
        async def run() -> None:
            await method()

        asyncio.run_coroutine_threadsafe(run(), loop).result(60)

    call(proxy.__aenter__)
    try:
        yield call
    finally:
        call(proxy.__aexit__)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
