"""Full tensors loaded into a vLLM model that has been loaded before, layer by layer, each worker taking its slices.

A layer is complete once all its tensors have come; then it is processed as on its first load, and its memory takes the
new values. Whoever calls this sees to it that the model does not generate meanwhile. `shadow.py` loads a model that
never does.
"""

from collections.abc import Iterable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from a3po_vllm.receiving import NamedTensors


def load(model: torch.nn.Module, config: ModelConfig, buckets: Iterable[NamedTensors]) -> None:
    """All tensors of the model or none: a parameter that was not there is a ValueError. `finish` comes after it."""
    missing = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    try:
        for tensors in buckets:
            loaded = model.load_weights(iter(tensors))
            missing = set() if loaded is None else missing - loaded
        if missing:
            raise ValueError(f"what was published lacks weights of the model: {sorted(missing)[:5]}")
    except BaseException:
        finalize_layerwise_reload(model, config)
        raise


def finish(model: torch.nn.Module, config: ModelConfig) -> None:
    finalize_layerwise_reload(model, config)
    _pack_tied_heads(model)


def _pack_tied_heads(model: torch.nn.Module) -> None:
    """On a CPU linear layers compute with a packed copy of their weight. A head tied to the embedding has no tensor of
    its own among those published, so that vLLM's reload passes it by and its copy would stay the old one. The embedding
    has packed the same weight."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {id(layer.weight): layer for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        embedding = embeddings.get(id(layer.weight), layer)
        if embedding is not layer and hasattr(layer, "cpu_linear"):
            layer.cpu_linear = embedding.cpu_linear
