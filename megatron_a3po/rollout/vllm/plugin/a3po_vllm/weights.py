"""The weight-transfer backend `a3po`: a worker loads what the trainer has published, from files or from the trainer.

Each worker takes its slices out of the full tensors, as it does when the model is loaded. vLLM calls the methods in the
order start_weight_update, update_weights, finish_weight_update, while generation is paused. An update that fails leaves
the worker ready for another, but with weights of nobody: it must not generate before one has succeeded.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from a3po_vllm.receiving import NamedTensors, Receiver
from a3po_vllm.staging import StagedUpdate


@dataclass
class Nothing(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where the weights come from; nothing where they have been staged."""

    source: dict[str, Any] = field(default_factory=dict)


class PublishedWeights(WeightTransferEngine[Nothing, Update]):
    """All tensors of the model or none: a parameter that was not there fails the update."""

    init_info_cls = Nothing
    update_info_cls = Update

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = Receiver(rank, self.device)
        self.staged = StagedUpdate(self._receiver)

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
        source = update_info.source
        self._load(self._receiver.buckets(source) if source else self.staged.tensors())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_again(self.model)

    def shutdown(self) -> None:
        self._receiver.close()

    def _load(self, buckets: Generator[NamedTensors, None, None]) -> None:
        missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        try:
            with closing(buckets):  # others that receive the same need not wait for a worker that fails
                for tensors in buckets:
                    loaded = self.model.load_weights(iter(tensors))
                    missing = set() if loaded is None else missing - loaded
            if missing:
                raise ValueError(f"what was published lacks weights of the model: {sorted(missing)[:5]}")
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise


def _pack_again(model: torch.nn.Module) -> None:
    """On a CPU linear layers compute with a packed copy of their weight. A head tied to the embedding has no tensor of
    its own among those published, so that vLLM's reload passes it by and its copy would stay the old one."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
