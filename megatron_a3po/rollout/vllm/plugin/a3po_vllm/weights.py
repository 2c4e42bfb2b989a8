"""The weight-transfer backend `a3po`: a worker loads what the trainer has published, from files or from the trainer.

vLLM calls the methods in the order start_weight_update, update_weights, finish_weight_update, while generation is
paused. An update that fails leaves the worker ready for another, but with weights of nobody: it must not generate
before one has succeeded.
"""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from a3po_vllm.loading import finish, load
from a3po_vllm.receiving import NamedTensors, Receiver
from a3po_vllm.shadow import Shadow, can_be_shadowed
from a3po_vllm.staging import Kept, Room, StagedUpdate

logger = init_logger("vllm.a3po")


@dataclass
class Nothing(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where the weights come from; nothing where they have been staged."""

    source: dict[str, Any] = field(default_factory=dict)


class PublishedWeights(WeightTransferEngine[Nothing, Update]):
    """One worker's."""

    init_info_cls = Nothing
    update_info_cls = Update

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = Receiver(rank, self.device)
        self.staged = StagedUpdate(self._receiver, self._room)

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes an accelerator whether there is one or not.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        if not update_info.source:
            self.staged.place()
            return
        with closing(
            self._receiver.buckets(update_info.source)
        ) as buckets:  # nobody waits for one that fails
            self._load(buckets)

    def finish_weight_update(self) -> None:
        finish(self.model, self.model_config)

    def shutdown(self) -> None:
        self._receiver.close()

    def _room(self) -> Room:
        if can_be_shadowed(self.model):
            logger.info("weights are staged in a shadow of the model: generation stands still for a copy")
            return Shadow(self.model, self.model_config)
        logger.info("weights are staged as they come: generation stands still while this model loads them")
        return Kept(self._load)

    def _load(self, buckets: Iterable[NamedTensors]) -> None:
        load(self.model, self.model_config, buckets)
