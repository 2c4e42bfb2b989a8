"""The transport `collective`: the trainer sends its weights to the workers of all servers at once, no file in between.

Every pipeline stage packs its tensors into buckets, which go to the main rank, one after another, two of them under
way; there they are kept in host memory until the next version. From that memory, on a thread of its own, the sender
serves all servers together while the rest is still being gathered, and later any server that comes back. So publishing
takes the trainer as long as gathering takes, and not as long as the slowest server.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.weights.transports.base import Export
from megatron_a3po.weights.transports.buckets import Bucket, pack, plan_buckets
from megatron_a3po.weights.transports.held import HeldWeights
from megatron_a3po.weights.transports.requests import Offer
from megatron_a3po.weights.transports.sender import Sender

TIMEOUT_S = 60.0  # for the members of a channel to meet, and then for each bucket


class CollectiveTransport:
    """device: where tensors are gathered, and what they are sent from: over NCCL from a GPU, over gloo from a CPU."""

    def __init__(
        self,
        device: torch.device,
        *,
        bucket_bytes: int,
        loopback_only: bool,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._loopback_only = loopback_only
        self._timeout_s = timeout_s
        self._plans: list[list[Bucket]] | None = None
        self._held = HeldWeights(pinned=device.type == "cuda")
        self._sender: Sender | None = None

    def publish(self, export: Export, version: int, directory: Path, announce: Callable[[], None]) -> None:
        plans = self._plans = self._plans or self._stage_plans(export)
        if export.is_main:
            self._held.begin(version, [bucket for plan in plans for bucket in plan])
            self._sender = self._sender or Sender(
                self._held,
                device=self._device,
                loopback_only=self._loopback_only,
                timeout_s=self._timeout_s,
            )
            Offer(self._sender.port).write(directory)
            announce()
        tensors = iter(export.tensors)
        if export.is_main:
            self._keep(tensors, plans, export.stages)
        elif export.stages is not None:
            self._hand_on(tensors, plans[dist.get_rank(export.stages)], export.stages)
        for _ in tensors:  # a rank that keeps nothing still takes part in gathering
            pass

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _stage_plans(self, export: Export) -> list[list[Bucket]]:
        """The buckets of every stage. Ranks that keep nothing announce nothing."""
        plans: list[list[Bucket]] = [[]] * dist.get_world_size(export.host_group)
        own = plan_buckets(export.announced, self._bucket_bytes)
        dist.all_gather_object(plans, own, group=export.host_group)
        return [plan for plan in plans if plan]

    def _keep(
        self,
        tensors: Iterator[tuple[str, Tensor]],
        plans: list[list[Bucket]],
        stages: dist.ProcessGroup | None,
    ) -> None:
        """The main rank's own tensors, then those of the stages after it."""
        index = 0
        for stage, plan in enumerate(plans):
            for bucket in plan:
                if stage == 0:
                    pack(tensors, bucket, self._held.room(index))
                else:
                    received = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
                    dist.recv(received, group=stages, group_src=stage)
                    self._held.room(index).copy_(received)
                self._held.filled()
                index += 1

    def _hand_on(
        self, tensors: Iterator[tuple[str, Tensor]], plan: list[Bucket], stages: dist.ProcessGroup
    ) -> None:
        """This stage's buckets to the main rank, the next one gathered meanwhile."""
        sent: tuple[dist.Work | None, Tensor] | None = None
        for bucket in plan:
            packed = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
            pack(tensors, bucket, packed)
            if sent is not None and sent[0] is not None:
                sent[0].wait()
            sent = dist.isend(packed, group=stages, group_dst=0), packed
        if sent is not None and sent[0] is not None:
            sent[0].wait()
