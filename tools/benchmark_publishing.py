"""What an update of real vLLM servers costs: its time and how long generation stands still, for every way there is.

Writes a random Qwen2 of some 500 MB in fp32, starts two vLLM servers, and publishes the weights to one that generates
all the while: as files and over the collective transport, staged in host memory and not. Beside them is the floor: the
same buckets over the same transport to a process that does nothing with them, into memory that it has used before, and
into memory that it fetches from the system for each. Then the servers' throughput, one against both. All in one run,
the ways taking turns; each figure is the median of the rounds.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tools/benchmark_publishing.py --vllm-python .venv-vllm/bin/python

Where there are three GPUs the same command publishes over NCCL, from and to device memory.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_a3po.config import read_model_shape
from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.engines.vllm import VllmEngine
from megatron_a3po.rollout.vllm.fleet import Fleet
from megatron_a3po.rollout.vllm.places import GivenPlace, Launch, LaunchedPlace, Place, new_token_file
from megatron_a3po.rollout.vllm.server import Server, Wanted
from megatron_a3po.weights.safetensors_file import Announced
from megatron_a3po.weights.transports.base import Export, Transport
from megatron_a3po.weights.transports.buckets import plan_buckets
from megatron_a3po.weights.transports.channel import Channel
from megatron_a3po.weights.transports.collective import CollectiveTransport
from megatron_a3po.weights.transports.files import FilesTransport

MAX_TOKENS = 512
START_S = 900.0
WAYS = [(transport, staging) for transport in ("files", "collective") for staging in ("none", "host")]


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    folder: Path
    token: str
    bucket_bytes: int
    device: torch.device

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def export(self) -> Export:
        """The model's weights, from where a trainer has them."""
        with safe_open(self.model / "model.safetensors", framework="pt", device=str(self.device)) as file:
            names = list(file.keys())
            tensors = [(name, file.get_tensor(name)) for name in names]
        announced = [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
        assert dist.group.WORLD is not None
        return Export(tensors, announced, self.model, dist.group.WORLD, dist.group.WORLD)

    @asynccontextmanager
    async def engine(self, urls: Sequence[str], directory: Path, staging: str = "none"):
        """Over servers that are there."""
        places: list[Place] = [
            GivenPlace(url, lambda url: self.connect(url, staging), START_S) for url in urls
        ]

        async def find() -> Sequence[Place]:
            return places

        wanted = Wanted(MAX_TOKENS, read_model_shape(self.model))
        fleet = Fleet(find, 0, directory, wanted=wanted, timeout_s=START_S)
        engine = VllmEngine(
            fleet, eos_token_ids=[], seed=1, max_concurrent_samples=64, segment_tokens=64, one_version=False
        )
        try:
            while len(fleet.serving) < len(urls):
                await asyncio.sleep(0.1)
            yield engine
        finally:
            await engine.close()

    def connect(self, url: str, staging: str) -> Server:
        return Server(
            url, token=self.token, on_update="keep_kv", timeout_s=START_S, is_staged=staging == "host"
        )


def write_model(folder: Path, layers: int) -> None:
    config = Qwen2Config(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        dtype="float32",  # pyright: ignore[reportCallIssue]
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def discard(arguments: dict[str, Any], num_bytes: list[int], device: torch.device, rounds: int) -> None:
    """The other end of the raw copy."""
    channel = Channel(rank=1, size=2, device=device, **arguments)
    buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for size in num_bytes]
    for _ in range(rounds):
        send(channel, buffers)
        send(channel, [torch.empty(size, dtype=torch.uint8, device=device) for size in num_bytes])
    channel.close()


def send(channel: Channel, buffers: list[torch.Tensor]) -> None:
    under_way: list[dist.Work] = []
    for buffer in buffers:
        under_way.append(channel.broadcast(buffer))
        if len(under_way) == 2:
            channel.wait(under_way.pop(0))
    for work in under_way:
        channel.wait(work)


def raw_copy(bench: Bench, rounds: int) -> Iterator[tuple[float, float]]:
    """Seconds of one raw copy after another: the buckets to another process over the collective transport, into used
    memory and into fresh."""
    sizes = [bucket.num_bytes for bucket in plan_buckets(bench.export().announced, bench.bucket_bytes)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    arguments = {
        "name": "raw",
        "address": "127.0.0.1",
        "port": store.port,
        "backend": backend,
        "timeout_s": START_S,
    }
    other = torch.device("cuda", 0) if bench.device.type == "cuda" else bench.device
    process = multiprocessing.get_context("spawn").Process(
        target=discard, args=(arguments, sizes, other, rounds)
    )
    process.start()
    channel = Channel(rank=0, size=2, device=bench.device, **arguments)
    buffers = [torch.zeros(size, dtype=torch.uint8, device=bench.device) for size in sizes]
    for _ in range(rounds):
        begun = time.perf_counter()
        send(channel, buffers)
        used = time.perf_counter()
        send(channel, buffers)
        yield used - begun, time.perf_counter() - used
    channel.close()
    process.join()


def requests(number: int, length: int, first: int = 0) -> list[SampleRequest]:
    rng = np.random.default_rng(first)
    prompts = rng.integers(2, 16000, (number, 32)).astype(np.int32)
    return [SampleRequest(first + index, 0, prompt, length) for index, prompt in enumerate(prompts)]


async def publish(
    bench: Bench, transport: Transport, url: str, staging: str, round_number: int
) -> dict[str, float]:
    """One update of a server that is generating."""
    first, second = (bench.folder / f"{id(transport)}-{staging}-{round_number}-{n}" for n in (0, 1))
    export = bench.export()
    await asyncio.to_thread(transport.publish, export, 0, first, lambda: None)
    async with bench.engine([url], first, staging) as engine:
        generating = [asyncio.create_task(generate_until(engine, first=4 * number)) for number in range(4)]
        await asyncio.sleep(3.0)
        begun = time.perf_counter()
        announced = asyncio.Event()
        loop = asyncio.get_running_loop()

        def announce() -> None:
            loop.call_soon_threadsafe(announced.set)

        publishing = asyncio.create_task(asyncio.to_thread(transport.publish, export, 1, second, announce))
        await announced.wait()
        updating = asyncio.create_task(engine.update_weights(1, second))
        await publishing
        held = time.perf_counter() - begun
        await updating
        seconds = time.perf_counter() - begun
        for task in generating:
            task.cancel()
        ended = await asyncio.gather(*generating, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
        return {
            "seconds": seconds,
            "trainer_held_s": held,
            "stall_s": engine.publication_metrics()["publish/stall_s"],
            "bytes": engine.publication_metrics()["publish/bytes"],
            "lost_requests": float(engine.take_num_lost()),
        }


async def generate_until(engine: VllmEngine, first: int) -> None:
    while True:
        await engine.generate(requests(1, 256, first))
        first += 100


async def throughput(bench: Bench, urls: Sequence[str], directory: Path) -> float:
    """Tokens a second."""
    async with bench.engine(urls, directory) as engine:
        await engine.generate(requests(2 * len(urls), 4))
        begun = time.perf_counter()
        samples = await engine.generate(requests(16, 48, first=1000))
        return sum(len(sample.tokens) for sample in samples) / (time.perf_counter() - begun)


async def measure(bench: Bench, urls: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    collective = CollectiveTransport(
        bench.device, bucket_bytes=bench.bucket_bytes, loopback_only=True, timeout_s=START_S
    )
    transports: dict[str, Transport] = {"files": FilesTransport(), "collective": collective}
    raw = raw_copy(bench, rounds)
    raws: list[tuple[float, float]] = []
    found: dict[tuple[str, str], list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        raws.append(await asyncio.to_thread(next, raw))
        for way in WAYS:
            found[way].append(await publish(bench, transports[way[0]], urls[0], way[1], number))
            print(way, found[way][-1], flush=True)
        print("raw copy", raws[-1], flush=True)
    next(raw, None)
    floor, fresh = (statistics.median(seconds) for seconds in zip(*raws, strict=True))
    raw_row = {"implementation": "collective", "bytes": found["collective", "none"][0]["bytes"]}
    rows: list[dict[str, Any]] = [
        {"case": "raw copy", **raw_row, "seconds": floor, "ratio": 1.0},
        {"case": "raw copy, fresh memory", **raw_row, "seconds": fresh, "ratio": floor / fresh},
    ]
    for (transport, staging), several in found.items():
        row: dict[str, Any] = {name: statistics.median(one[name] for one in several) for name in several[0]}
        row["stall_share"] = row["stall_s"] / row["seconds"]
        # Bandwidth against the raw copy's.
        row["ratio"] = floor / row["seconds"]
        rows.append({"case": f"{transport}, {staging}", "implementation": transport, **row})
    directory = bench.folder / "throughput"
    await asyncio.to_thread(transports["files"].publish, bench.export(), 0, directory, lambda: None)
    one = await throughput(bench, urls[:1], directory)
    two = await throughput(bench, urls, directory)
    rows.append({"case": "throughput, 1 server", "implementation": "vllm", "tokens_per_s": one, "ratio": 1.0})
    rows.append(
        {"case": "throughput, 2 servers", "implementation": "vllm", "tokens_per_s": two, "ratio": two / one}
    )
    collective.close()
    return rows


async def run(bench: Bench, launch: Launch, rounds: int) -> list[dict[str, Any]]:
    places = [
        LaunchedPlace(launch, bench.folder / f"vllm-{number}.log", lambda url: bench.connect(url, "none"))
        for number in range(2)
    ]
    try:
        urls: list[str] = []
        for number, place in enumerate(places):
            if bench.device.type == "cuda":
                os.environ["CUDA_VISIBLE_DEVICES"] = str(number)  # read by the server that is started next
            urls.append((await place.open()).url)
        return await measure(bench, urls, rounds)
    finally:
        for place in places:
            await place.close()


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("seconds", "trainer_held_s", "stall_s", "stall_share", "tokens_per_s", "ratio")
    print(f"{'':24}" + "".join(f"{column:>16}" for column in columns))
    for row in rows:
        cells = (f"{row[column]:16.3f}" if column in row else " " * 16 for column in columns)
        print(f"{row['case']:24}" + "".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vllm-python", required=True, help="an interpreter with vLLM")
    parser.add_argument("--layers", type=int, default=10, help="45 MB each, beside 67 MB of embedding")
    parser.add_argument("--bucket-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        write_model(folder / "model", arguments.layers)
        token_file = folder / "vllm.token"
        # The servers have the first two.
        device = torch.device("cuda", torch.cuda.device_count() - 1) if has_gpu else torch.device("cpu")
        bench = Bench(folder, new_token_file(token_file), arguments.bucket_bytes, device)
        launch = Launch(
            python=arguments.vllm_python,
            model_dir=bench.model,
            dtype="float32",
            max_tokens=MAX_TOKENS,
            max_samples=16,
            seed=1,
            num_threads=1,
            token_file=token_file,
            timeout_s=START_S,
            on_cpu=not has_gpu,
        )
        rows = asyncio.run(run(bench, launch, arguments.rounds))
        dist.destroy_process_group()
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
