"""What publishing asks of a transport, and what it gives it. `files.py` and `collective.py` are the transports.

A published version is a directory of its own, whichever transport is in use. Under `files` it holds the weights, under
`collective` it says where the trainer has them. Whoever passes versions on passes directories on and knows no more; the
update of a vLLM server alone (`rollout/vllm/updates.py`) looks inside.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_a3po.weights.hugging_face import write_hugging_face
from megatron_a3po.weights.safetensors_file import Announced


@dataclass(frozen=True)
class Export:
    """The weights of this moment, in Hugging Face naming, as this rank takes part in gathering them.

    tensors: full tensors; every rank of a stage has to go through them, since each is gathered by all of them.
    announced: what `tensors` brings, in order, on the one rank of a stage that keeps them; empty on the others.
    template: the Hugging Face directory whose configuration goes along.
    stages: the ranks that keep tensors, one for each pipeline stage, in their order; None where this rank keeps none.
    """

    tensors: Iterable[tuple[str, Tensor]]
    announced: Sequence[Announced]
    template: Path
    host_group: dist.ProcessGroup
    stages: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return dist.get_rank(self.host_group) == 0

    def write(self, directory: Path, *, lasting: bool) -> None:
        """As a Hugging Face directory (`write_hugging_face`). Collective over all ranks."""
        write_hugging_face(
            self.tensors,
            self.announced,
            directory,
            template=self.template,
            peers=self.host_group,
            lasting=lasting,
        )


class Transport(Protocol):
    def publish(self, export: Export, version: int, directory: Path, announce: Callable[[], None]) -> None:
        """Make the weights available as `directory`; when it returns, they may change. Collective over all ranks.

        announce: called on the main rank as soon as engines may begin to take them.
        Errors: OutputError on every rank where a file cannot be written.
        """
        ...

    def close(self) -> None:
        """Nothing can be taken from here any more."""
        ...
