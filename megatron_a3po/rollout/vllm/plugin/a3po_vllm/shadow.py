"""A model beside the one that generates, in host memory: weights are loaded into it, and change places in one copy.

The shadow has the modules of the model, as shallow copies, and parameters of its own, sharded and processed like the
model's. So what costs time, slicing, joining and packing, is done while the model generates. `place` copies parameter
into parameter, which keeps the memory that CUDA graphs know. Where a CPU computes with packed weights, these are handed
over as they are: they are no parameters.

Not every model can have one: `can_be_shadowed`. Attention stays out of it: it has no weights, and is processed in
place.
"""

import copy
from collections.abc import Iterable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

from a3po_vllm.loading import finish, load
from a3po_vllm.receiving import NamedTensors

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def can_be_shadowed(model: torch.nn.Module) -> bool:
    """Whether processing leaves nothing behind but parameters and packed linear layers. Quantized layers and mixtures
    of experts build kernels, which belong to their own memory."""
    for module in model.modules():
        if is_deferred_attention_layer(module):
            suits = next(module.parameters(), None) is None
        elif (method := getattr(module, "quant_method", None)) is not None:
            suits = type(method) in PLAIN
        else:
            suits = not hasattr(module, "process_weights_after_loading")
        if not suits:
            return False
    return True


class Shadow:
    """Made once the model has been loaded and processed for the first time."""

    def __init__(self, model: torch.nn.Module, config: ModelConfig) -> None:
        self._config = config
        self._attention = [one for one in model.modules() if is_deferred_attention_layer(one)]
        self._shadows: dict[torch.nn.Module, torch.nn.Module] = {}
        self._parameters: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        self._model = self._shadow_of(model)

    def fill(self, buckets: Iterable[NamedTensors]) -> None:
        load(self._model, self._config, buckets)
        finish(self._model, self._config)

    def place(self) -> None:
        with torch.no_grad():
            for parameter, shadow in self._parameters.items():
                parameter.data.copy_(shadow.data, non_blocking=True)
        for module, shadow in self._shadows.items():
            if hasattr(shadow, "cpu_linear"):
                module.cpu_linear = shadow.cpu_linear
        for layer in self._attention:
            layer.process_weights_after_loading(self._config.dtype)

    def _shadow_of(self, module: torch.nn.Module) -> torch.nn.Module:
        if module in self._shadows:
            return self._shadows[module]
        if is_deferred_attention_layer(module):
            return torch.nn.Module()
        shadow = self._shadows[module] = copy.copy(module)
        shadow._parameters = {
            name: None if parameter is None else self._parameter_of(parameter)
            for name, parameter in module._parameters.items()
        }
        shadow._buffers = dict(module._buffers)
        shadow._modules = {
            name: None if child is None else self._shadow_of(child) for name, child in module._modules.items()
        }
        info = get_layerwise_info(shadow)
        info.restore_device = torch.device("cpu")
        parameters, buffers = get_layerwise_info(module).restore_metadata
        info.restore_metadata = tuple(
            {name: _unwrapped(to_meta_tensor(tensor)) for name, tensor in tensors.items()}
            for tensors in (parameters, buffers)
        )
        return shadow

    def _parameter_of(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """The same for tied ones."""
        if parameter not in self._parameters:
            pinned = torch.cuda.is_available()
            shadow = torch.empty_like(parameter.data, device="cpu", pin_memory=pinned)
            shadow.__class__ = parameter.__class__
            shadow.__dict__ = parameter.__dict__.copy()
            self._parameters[parameter] = _unwrapped(shadow)
        return self._parameters[parameter]


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """A reload of the model may have left its own loader there, which would fill the model."""
    tensor.weight_loader = _get_original_loader(tensor)
    return tensor
