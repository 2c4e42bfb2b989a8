"""A frozen policy on the trained one's ranks: its shards wait in host memory and take the model's place to score.

No second model: the actor's weights are exchanged with the copies in place, one tensor at a time, and back again to the
bit. So a reference costs one copy of the weights on the host and a forward of every token it scores. Which policy it is
and where its weights are kept, the trainer decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_a3po.actor.actor import Actor
from megatron_a3po.weights.shards import load_shards
from megatron_a3po.weights.sources import SafetensorsSource


class Reference:
    """This rank's shards of the policy in a Hugging Face directory.

    Errors: InputError where the directory holds another model.
    """

    def __init__(self, actor: Actor, directory: Path) -> None:
        self.actor = actor
        pinned = actor.grid.device.type == "cuda"
        self._waiting = {
            name: torch.empty(shard.shape, dtype=shard.dtype, device="cpu", pin_memory=pinned)
            for name, shard in actor.shards()
        }
        source = SafetensorsSource(directory, actor.table)
        load_shards(self._waiting.items(), source, actor.table, actor.layout)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the actor scores as the reference would; it must not train. Collective over all ranks."""
        shards = self.actor.shards()
        self._exchange(shards)
        try:
            yield
        finally:
            self._exchange(shards)

    @torch.no_grad()
    def _exchange(self, shards: list[tuple[str, Tensor]]) -> None:
        for name, shard in shards:
            own = shard.detach().clone()
            shard.copy_(self._waiting[name])
            self._waiting[name].copy_(own)
