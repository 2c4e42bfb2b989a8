"""A server that answers vLLM's routes as slowly, or as brokenly, as a test wants, without a model: for tests of which
server gets work, and of what becomes of the others. What a real server answers is in `test_vllm.py`.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_a3po.config import read_model_shape
from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.engines.vllm import VllmEngine
from megatron_a3po.rollout.vllm.fleet import Fleet
from megatron_a3po.rollout.vllm.places import GivenPlace
from megatron_a3po.rollout.vllm.server import Server, Wanted
from tests.run_files import write_model

TOKEN, EOS = 5, 1
ROUTES = ("/inference/v1/generate", "/start_weight_update", "/weight_info")


class StandInServer:
    """`answer_s` tells how long a request for tokens takes; a route in `broken` closes its connection so many times;
    one in `hanging` never answers; one in `missing` is not there."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.label = "default"
        self.answer_s: Callable[[], float] = lambda: 0.0
        self.broken: Counter[str] = Counter()
        self.hanging: set[str] = set()
        self.missing: set[str] = set()
        self.version = "0.32.0"
        self.asked: list[str] = []
        self.url = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._goes = asyncio.Event()
        self._goes.set()

    async def start(self) -> "StandInServer":
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.create_task(self._converse(reader, writer)))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                path = first.split(" ")[1].partition("?")[0]
                self.asked.append(path)
                if self.broken[path] > 0:
                    self.broken[path] -= 1
                    return writer.transport.abort()
                code, answer = await self._answer(path, json.loads(body or b"{}"))
                raw = json.dumps(answer).encode()
                writer.write(f"HTTP/1.1 {code} -\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        while path in self.hanging:
            await asyncio.sleep(0.05)
        if path in self.missing:
            return 404, {}
        if path == "/inference/v1/generate":
            return await self._generate(body["sampling_params"])
        if path == "/pause":
            self._goes.clear()
        if path == "/resume":
            self._goes.set()
        if path == "/finish_weight_update":
            self.label = body["weight_version"]
        return 200, {
            "/version": {"version": self.version},
            "/openapi.json": {"paths": {route: {} for route in ROUTES}},
            "/server_info": {"vllm_config": self._config()},
            "/get_world_size": {"world_size": 1},
            "/weight_info": {"weight_version": self.label},
        }.get(path, {})

    async def _generate(self, sampling: dict[str, Any]) -> tuple[int, Any]:
        if sampling["stop_token_ids"] == [2**31 - 1]:
            return 400, {"error": f"Vocabulary size: {read_model_shape(self.model).vocab_size}"}
        await asyncio.sleep(self.answer_s())
        await self._goes.wait()
        num_tokens = sampling["max_tokens"]
        choice = {
            "token_ids": [TOKEN] * num_tokens,
            "logprobs": {"content": [{"token_id": TOKEN, "logprob": -1.0}] * num_tokens},
            "weight_versions": [{"version": self.label, "start": 0, "end": num_tokens}],
            "finish_reason": "length",
        }
        return 200, {"choices": [choice]}

    def _config(self) -> dict[str, Any]:
        return {
            "model_config": {
                "model": str(self.model),
                "dtype": "torch.float32",
                "logprobs_mode": "processed_logprobs",
                "max_model_len": 512,
            },
            "weight_transfer_config": {"backend": "a3po"},
            "parallel_config": {"worker_extension_cls": "a3po_vllm.staging.Staging"},
        }


class Servers:
    """Stand-ins, and the fleet and engine that are given their URLs. No server for `gone_s` ends the fleet."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self.model = write_model(folder)
        self.servers: list[StandInServer] = []
        self.fleet: Fleet
        self.engine: VllmEngine

    async def start(self, number: int) -> None:
        self.begin([await StandInServer(self.model).start() for _ in range(number)], gone_s=60.0)
        await self.until(lambda: len(self.fleet.serving) == number)

    def begin(self, servers: list[StandInServer], gone_s: float) -> None:
        self.servers = servers
        places = [GivenPlace(server.url, self._connect, self.timeout_s) for server in self.servers]

        async def find() -> Sequence[GivenPlace]:
            return places

        wanted = Wanted(40, read_model_shape(self.model), "float32")
        self.fleet = Fleet(find, 0, self.folder, wanted=wanted, timeout_s=gone_s)
        self.engine = VllmEngine(
            self.fleet,
            eos_token_ids=[EOS],
            seed=1,
            max_concurrent_samples=64,
            segment_tokens=8,
            one_version=False,
        )

    async def close(self) -> None:
        await self.engine.close()
        for server in self.servers:
            await server.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.02)

    def _connect(self, url: str) -> Server:
        return Server(url, token=None, on_update="recompute_kv", timeout_s=self.timeout_s)


def request(prompt_index: int, sample: int = 0) -> SampleRequest:
    return SampleRequest(prompt_index, sample, np.array([2, 3], np.int32), 8)
