"""The weight-transfer backend `disk`: a worker reads the new weights from a Hugging Face directory.

The trainer's publications are such directories, whole under their final name, so that reading one needs no agreement
between the two sides. Each worker takes its slices out of the full tensors, as it does when the model is loaded. vLLM
calls the methods in the order start_weight_update, update_weights, finish_weight_update, while generation is paused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class DiskInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class DiskUpdate(WeightTransferUpdateInfo):
    directory: str


class DiskWeights(WeightTransferEngine[DiskInit, DiskUpdate]):
    """All tensors of the directory or none: a parameter that was not there fails the update."""

    init_info_cls = DiskInit
    update_info_cls = DiskUpdate

    def init_transfer_engine(self, init_info: DiskInit) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes an accelerator whether there is one or not.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: DiskUpdate) -> None:
        files = sorted(Path(update_info.directory).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{update_info.directory} has no *.safetensors: can this machine see it?")
        wanted = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(_tensors(files))
        if loaded is not None and (missing := sorted(wanted - loaded)):
            raise ValueError(f"{update_info.directory} lacks weights of the model: {missing[:5]}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_again(self.model)

    def shutdown(self) -> None:
        pass


def _pack_again(model: torch.nn.Module) -> None:
    """On a CPU linear layers compute with a packed copy of their weight. A head tied to the embedding has no tensor of
    its own in the directory, so that vLLM's reload passes it by and its copy would stay the old one."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dictionary
                yield name, opened.get_tensor(name)
