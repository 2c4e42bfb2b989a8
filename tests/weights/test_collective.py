"""The collective transport between real processes: order, types and bytes on the other side, and what breaks it.

Two ranks are pipeline stages of a trainer, two are workers of servers, by the code that runs in a vLLM worker; no vLLM
is needed for it. Rank 0 asks for the transfers too, as the rollout process does.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_a3po.rollout.vllm.places import PLUGIN
from megatron_a3po.weights.safetensors_file import Announced
from megatron_a3po.weights.transports.base import Export
from megatron_a3po.weights.transports.buckets import ALIGNMENT, pack, plan_buckets
from megatron_a3po.weights.transports.collective import CollectiveTransport
from megatron_a3po.weights.transports.held import HeldWeights
from megatron_a3po.weights.transports.requests import Transfer, read_offer
from megatron_a3po.weights.transports.sender import Sender
from tests.distributed.ranks import run_ranks

sys.path.append(str(PLUGIN))
from a3po_vllm.channel import ChannelError  # pyright: ignore[reportMissingImports]
from a3po_vllm.receiving import Receiver, unpack  # pyright: ignore[reportMissingImports]

TIMEOUT_S = 30.0
CPU = torch.device("cpu")
STAGES, WORKERS = (0, 1), (2, 3)


def weights(stage: int, version: int) -> list[tuple[str, torch.Tensor]]:
    """Of several types and odd sizes, one larger than a bucket, one that is not contiguous."""
    torch.manual_seed(10 * version + stage)
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.randn(40, 30),
        torch.randn(4, 6).T,
        torch.randint(0, 255, (3,), dtype=torch.uint8),
        torch.tensor(1.5 * version, dtype=torch.float64),
    ]
    return [(f"stage {stage} tensor {number}", tensor) for number, tensor in enumerate(tensors)]


def announced(tensors: list[tuple[str, torch.Tensor]]) -> list[Announced]:
    return [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]


def assert_same(found: list[tuple[str, torch.Tensor]], version: int) -> None:
    expected = [pair for stage in STAGES for pair in weights(stage, version)]
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, tensor), (_, other) in zip(found, expected, strict=True):
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor, other), name


def test_a_bucket_is_taken_apart_as_it_was_packed():
    tensors = weights(0, 1)
    buckets = plan_buckets(announced(tensors), 200)
    assert [len(bucket.tensors) for bucket in buckets] == [2, 1, 3]
    stream = iter(tensors)
    found = []
    for bucket in buckets:
        raw = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        pack(stream, bucket, raw)
        assert all(offset % ALIGNMENT == 0 for offset in bucket.offsets)
        found += unpack(raw, bucket.as_json())
    for (name, tensor), (other_name, other) in zip(found, tensors, strict=True):
        assert name == other_name
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


def test_another_tensor_than_the_one_announced_is_refused():
    tensors = weights(0, 1)
    (bucket,) = plan_buckets(announced(tensors), 10**9)
    with pytest.raises(AssertionError, match="tensor 1"):
        pack(iter([tensors[0], *tensors[2:]]), bucket, torch.zeros(bucket.num_bytes, dtype=torch.uint8))


def test_weights_that_are_being_read_stay():
    held = HeldWeights(pinned=False)
    buckets = plan_buckets(announced(weights(0, 1)), 200)
    held.begin(1, buckets)
    for _ in buckets:
        held.filled()
    with held.reading() as (version, _):
        begins = threading.Thread(target=held.begin, args=(2, buckets))
        begins.start()
        assert version == 1
        assert len(list(held.as_filled(TIMEOUT_S))) == 3
        assert begins.is_alive()
    begins.join(TIMEOUT_S)
    with held.reading() as (version, _):
        assert version == 2
        with pytest.raises(TimeoutError):
            list(held.as_filled(0.01))


def listens_at(port: int) -> set[str]:
    """The IPv4 addresses, as the kernel writes them, at which this machine listens on a port; /proc/net/tcp(6)."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    return {
        at[-8:]
        for _, local, _, state, *_ in lines
        for at, _, found in [local.partition(":")]
        if state == "0A" and int(found, 16) == port
    }


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/net")
def test_only_this_machine_can_ask_for_weights_and_nonsense_is_answered():
    held = HeldWeights(pinned=False)
    held.begin(1, [])
    sender = Sender(held, device=CPU, loopback_only=False, timeout_s=5.0)
    try:
        assert listens_at(sender.port) == {"0100007F"}
        store = TCPStore("127.0.0.1", sender.port, is_master=False, wait_for_workers=False)
        for number in (1, 2):
            assert store.add("transfers", 1) == number
            store.set(f"request/{number}", json.dumps({"hello": 1}))
            store.wait([f"outcome/{number}"])
            assert b"members" in store.get(f"outcome/{number}")
    finally:
        sender.close()


def test_workers_receive_what_all_stages_have_and_the_rest_outlives_one_that_breaks_off(tmp_path: Path):
    answers = run_ranks(play, len(STAGES) + len(WORKERS), tmp_path, timeout_s=120.0)
    first, again, broken, alone = answers[0]
    assert [answer["version"] for answer in (first, again, broken, alone)] == [1, 2, 2, 2]
    assert first["channel"]["name"] == again["channel"]["name"], "the same members meet once"
    assert broken["why"]
    assert [one["why"] for one in (first, again, alone)] == ["", "", ""]


def play(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Two versions for both workers; worker 3 breaks off half-way through a third transfer; a fourth for the other."""
    trainer = cast(dist.ProcessGroup, dist.new_group(list(STAGES)))
    if rank in WORKERS:
        return work(rank, folder)
    transport = CollectiveTransport(CPU, bucket_bytes=200, loopback_only=True, timeout_s=TIMEOUT_S)
    transfers: list[Transfer] = []

    def publish(version: int) -> None:
        own = weights(rank, version)
        export = Export(own, announced(own), folder, trainer, trainer)
        directory = folder / f"version-{version}"
        transport.publish(export, version, directory, lambda: transfers.append(ask(directory, version, "ab")))

    publish(1)
    publish(2)
    if rank != 0:
        return []
    answers = [transfer.answer() | {"why": transfer.why_broken()} for transfer in transfers]
    for number, members in ((3, "ac"), (4, "a")):
        transfer = ask(folder / "version-2", number, members)
        answers.append(transfer.answer() | {"why": transfer.why_broken()})
    transport.close()
    return answers


def ask(directory: Path, number: int, members: str) -> Transfer:
    """As the rollout process does, and tell the workers, which hear of it by file."""
    offer = read_offer(directory)
    assert offer is not None
    transfer = Transfer(offer, list(members), len(members), "127.0.0.1", TIMEOUT_S)
    told = directory.parent / f"told-{number}"
    told.with_suffix(".tmp").write_text(json.dumps(transfer.answer()))
    told.with_suffix(".tmp").rename(told)
    return transfer


def work(rank: int, folder: Path) -> list[dict[str, Any]]:
    receiver = Receiver(rank - WORKERS[0], CPU)
    for number in (1, 2, 3, 4) if rank == WORKERS[0] else (1, 2, 3):
        told = folder / f"told-{number}"
        while not told.exists():
            time.sleep(0.01)
        answer = json.loads(told.read_text())
        buckets = receiver.buckets({**answer, "first_rank": 1})
        if number < 3 or number == 4:
            assert_same([pair for bucket in buckets for pair in bucket], answer["version"])
        elif rank == WORKERS[-1]:
            next(buckets)
            receiver.close()
        else:
            with pytest.raises(ChannelError):
                list(buckets)
    receiver.close()
    return []
