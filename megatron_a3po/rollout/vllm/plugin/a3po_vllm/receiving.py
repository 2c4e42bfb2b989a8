"""Where new weights come from, whichever way: (name, tensor) in groups, a bucket ahead of who loads them.

A source is a dictionary that the trainer's side made: `directory` names a Hugging Face directory, `channel` says how to
join the workers that all receive the same buckets from the trainer. No vLLM here.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from a3po_vllm.channel import Channel

NamedTensors = list[tuple[str, torch.Tensor]]


class Receiver:
    """One worker's; `rank` counts the workers of its server. A channel stays open from one update to the next."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._channel: Channel | None = None

    def buckets(self, source: dict[str, Any]) -> Generator[NamedTensors, None, None]:
        """All weights of the source, each tensor once; they stay as they are for as long as somebody has them."""
        if "directory" in source:
            yield from _read(Path(source["directory"]))
            return
        try:
            yield from self._receive(self._join(source), source["buckets"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _join(self, source: dict[str, Any]) -> Channel:
        wanted = source["channel"]
        if self._channel is None or self._channel.name != wanted["name"]:
            self.close()
            rank = source["first_rank"] + self._rank
            self._channel = Channel(rank=rank, device=self._device, **wanted)
        return self._channel

    def _receive(
        self, channel: Channel, buckets: list[dict[str, Any]]
    ) -> Generator[NamedTensors, None, None]:
        under_way = None
        for bucket in buckets:
            # Memory of its own for each bucket: vLLM keeps some tensors until the rest of their layer is there.
            raw = torch.empty(bucket["num_bytes"], dtype=torch.uint8, device=self._device)
            begun = (channel.broadcast(raw), raw, bucket)
            if under_way is not None:
                yield _arrived(channel, *under_way)
            under_way = begun
        if under_way is not None:
            yield _arrived(channel, *under_way)


def _arrived(channel: Channel, work: Any, raw: torch.Tensor, bucket: dict[str, Any]) -> NamedTensors:
    channel.wait(work)
    return unpack(raw, bucket)


def unpack(raw: torch.Tensor, bucket: dict[str, Any]) -> NamedTensors:
    """Views of the bytes."""
    tensors = []
    for name, dtype_name, shape, offset in bucket["tensors"]:
        dtype = getattr(torch, dtype_name)
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        tensors.append((name, raw[offset:end].view(dtype).view(shape)))
    return tensors


def _read(directory: Path) -> Generator[NamedTensors, None, None]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors: can this machine see it?")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dictionary
                yield [(name, opened.get_tensor(name))]
