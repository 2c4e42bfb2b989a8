"""Updates of several servers at once, where some fail: who is out, who is tried again, and what the rest have then.

The servers are processes that answer vLLM's routes and receive with the plugin's own code, but have no model: they show
what they loaded as checksums. One is killed, one stopped, one refuses; a real vLLM is in test_vllm_transports.py.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_a3po.rollout.vllm import updates
from megatron_a3po.rollout.vllm.places import PLUGIN
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.rollout.vllm.updates import Updated, update_servers
from megatron_a3po.weights.safetensors_file import Announced
from megatron_a3po.weights.transports.base import Export
from megatron_a3po.weights.transports.collective import CollectiveTransport
from tests.distributed.ranks import run_ranks

CHANNEL_S = 10.0  # for one who is stopped; others break a transfer at once
LOADED_S = 300.0
STAND_IN = """
import http.server, json, sys, torch
from contextlib import closing
from types import SimpleNamespace
from a3po_vllm.receiving import Receiver
from a3po_vllm.staging import Kept, StagedUpdate, Staging

def sums(tensors):
    return {name: tensor.double().sum().item() for name, tensor in tensors}

def load(buckets):
    for tensors in buckets:
        if "refuse" in sys.argv:
            raise ValueError("of another shape")
        loaded.update(sums(tensors))

def deny():
    global taken
    if taken == max_taken:
        raise ValueError("not now")
    taken += 1

taken, max_taken = 0, next((int(one) for one in sys.argv if one.isdigit()), -1)
asked, loaded, room = [], {}, Kept(load)
receiver = Receiver(0, torch.device("cpu"))
staged = StagedUpdate(receiver, lambda: room)
worker = Staging()
worker.weight_transfer_engine = SimpleNamespace(staged=staged)

def act(path, body):
    if path == "/update_weights":
        if source := body["update_info"]["source"]:
            deny()
            with closing(receiver.buckets(source)) as buckets:
                load(buckets)
        else:
            staged.place()
    if path == "/collective_rpc":
        if body["method"] == "stage_weights":
            deny()
        return {"results": [getattr(worker, body["method"])(*body["args"])]}
    if path == "/shown":
        return {"asked": asked, "loaded": loaded, "staged": sums(list(room._memory.items()))}
    return {}

class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        path, size = self.path.partition("?")[0], int(self.headers.get("Content-Length") or 0)
        asked.append(path)
        try:
            code, answer = 200, act(path, json.loads(self.rfile.read(size) or b"{}"))
        except Exception as error:
            code, answer = 500, {"error": repr(error)}
        raw = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
print(server.server_port, flush=True)
server.serve_forever()
"""


class StandIn:
    """A process that answers like a vLLM server; `handle` is the run's."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STAND_IN, *arguments],
            env={**os.environ, "PYTHONPATH": str(PLUGIN), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.handle: Server | None = None

    def url(self) -> str:
        assert self.process.stdout is not None
        return f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def weights(version: int, rows: int = 50) -> list[tuple[str, torch.Tensor]]:
    return [(f"tensor {number}", torch.full((rows, 10), version + number / 8)) for number in range(8)]


def checksums(version: int) -> dict[str, float]:
    return {name: tensor.double().sum().item() for name, tensor in weights(version)}


def export(
    tensors: list[tuple[str, torch.Tensor]], half_way: threading.Event, go_on: threading.Event
) -> Export:
    """The second half of the tensors comes when it is asked for."""

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(tensors):
            if number == 4:
                half_way.set()
                go_on.wait()
            yield pair

    announced = [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    assert dist.group.WORLD is not None
    return Export(stream(), announced, Path(), dist.group.WORLD, dist.group.WORLD)


class Publisher:
    """A trainer of one rank. What happens in the middle of a transfer is the caller's."""

    def __init__(self, folder: Path, *, rows: int = 50, timeout_s: float = CHANNEL_S) -> None:
        self.transport = CollectiveTransport(
            torch.device("cpu"), bucket_bytes=2000, loopback_only=True, timeout_s=timeout_s
        )
        self._folder, self._rows = folder, rows

    async def publish(self, version: int, servers: list[Server], in_between: Any = None) -> Updated:
        directory = self._folder / f"version-{version}"
        half_way, go_on, announced = threading.Event(), threading.Event(), threading.Event()
        exported = export(weights(version, self._rows), half_way, go_on)
        publishing = asyncio.create_task(
            asyncio.to_thread(self.transport.publish, exported, version, directory, announced.set)
        )
        await asyncio.to_thread(announced.wait)
        updating = asyncio.create_task(update_servers(servers, version, directory))
        await asyncio.to_thread(half_way.wait)
        if in_between is not None:
            for server in servers:
                await has_begun(server, version)
            in_between()
        go_on.set()
        await publishing
        return await updating

    def num_transfers(self) -> int:
        """What was asked for so far, broken ones among them."""
        sender = self.transport._sender
        assert sender is not None
        return sender._server.add("transfers", 0)


async def has_begun(server: Server, version: int) -> None:
    """Waits until the first tensor of this version has come."""
    name, checksum = next(iter(checksums(version).items()))
    while True:
        shown = await server._call("POST", "/shown")
        if checksum in (shown["loaded"].get(name), shown["staged"].get(name)):
            return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_staged", [False, True])
def test_who_fails_is_out_and_the_rest_have_the_weights(tmp_path: Path, is_staged: bool):
    """Two sound servers; beside them in turn nobody, one that is stopped, one that is killed, one that refuses."""

    async def run() -> None:
        stopped, killed = others
        sound = handles[:2]
        gone, publisher = Publisher(tmp_path / "gone"), Publisher(tmp_path)
        try:
            await gone.publish(1, sound)
            gone.transport.close()
            # The servers outlived that trainer, and take the weights of this one as if it had never been.
            updated = await publisher.publish(1, [*sound, handles[2]])
            assert updated.failed == {}
            assert publisher.num_transfers() == 1
            if not is_staged:  # it takes all the time that a member waits for another
                updated = await publisher.publish(
                    2, [*sound, handles[2]], lambda: os.kill(stopped.process.pid, signal.SIGSTOP)
                )
                assert list(updated.failed) == [handles[2]]
            updated = await publisher.publish(
                3, [*sound, handles[3]], lambda: os.kill(killed.process.pid, signal.SIGKILL)
            )
            assert list(updated.failed) == [handles[3]]
            updated = await publisher.publish(4, [*sound, handles[4]])
            assert list(updated.failed) == [handles[4]]
            assert "of another shape" in str(updated.failed[handles[4]])
            for server in sound:
                shown = await server._call("POST", "/shown")
                assert shown["loaded"] == checksums(4)
                assert server.version == updated.version == 4
                # One call for all buckets, and another for each time that a transfer broke.
                num_updates = 5 - is_staged
                assert shown["asked"].count("/update_weights") <= num_updates * (1 if is_staged else 3)
                assert shown["asked"].count("/resume") == num_updates
            assert updated.num_bytes >= 8 * 50 * 10 * 4
        finally:
            for server in handles:
                await server.close()
            publisher.transport.close()

    with ExitStack() as stack:
        stand_ins = [StandIn() for _ in range(4)] + [StandIn("refuse")]
        for one in stand_ins:
            stack.callback(one.end)
        others = stand_ins[2:4]
        urls = [one.url() for one in stand_ins]
        handles: list[Server] = []

        def make_and_play(rank: int, world_size: int) -> None:
            handles.extend(
                Server(url, token=None, on_update="keep_kv", timeout_s=LOADED_S, is_staged=is_staged)
                for url in urls
            )
            updates.GRACE_S = 5.0  # of this process alone
            asyncio.run(run())

        run_ranks(make_and_play, 1, timeout_s=LOADED_S)


@pytest.mark.parametrize("is_staged", [False, True])
def test_a_transfer_that_a_server_refuses_is_over_at_once(tmp_path: Path, is_staged: bool):
    """One refuses before it meets the sender, alone and beside another; one when they have met, where the bytes are too
    many to go unread. A member would wait for as long as the whole test may take."""

    async def run(never: Server, once: Server, sound: Server) -> None:
        publisher = Publisher(tmp_path, rows=200_000, timeout_s=2 * LOADED_S)
        try:
            updated = await publisher.publish(1, [never])
            assert "not now" in str(updated.failed[never])
            updated = await publisher.publish(2, [never, sound])
            assert list(updated.failed) == [never]
            assert sound.version == 2
            assert (await publisher.publish(3, [once])).failed == {}
            for version in (4, 5):
                updated = await publisher.publish(version, [once])
                assert "not now" in str(updated.failed[once])
        finally:
            publisher.transport.close()

    async def make_and_run() -> None:
        servers = [
            Server(url, token=None, on_update="keep_kv", timeout_s=2 * LOADED_S, is_staged=is_staged)
            for url in urls
        ]
        try:
            await run(*servers)
        finally:
            for server in servers:
                await server.close()

    with ExitStack() as stack:
        stand_ins = [StandIn("0"), StandIn("1"), StandIn()]
        for one in stand_ins:
            stack.callback(one.end)
        urls = [one.url() for one in stand_ins]
        run_ranks(lambda rank, world_size: asyncio.run(make_and_run()), 1, timeout_s=LOADED_S)
