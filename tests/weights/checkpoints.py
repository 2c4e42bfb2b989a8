"""Tiny random checkpoints of every dense family, made by transformers itself.

More layers than a window's pattern has, heads that are not hidden / heads wide, two key-value heads, an odd vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 99
WINDOW = 8
EOS_ID = 1
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GEMMA3: dict[str, Any] = {
    "head_dim": 20,
    "query_pre_attn_scalar": 40,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, **{k: LINEAR_ROPE[k] for k in ("rope_type", "factor")}},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
    "tie_word_embeddings": True,
}
DENSE: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama 3.1": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear": (LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "mistral": (MistralConfig, {"head_dim": 20, "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, window": (Qwen2Config, WINDOWED),
    "qwen3": (Qwen3Config, {"head_dim": 20}),
    "qwen3, window": (Qwen3Config, {"head_dim": 20, **WINDOWED}),
    "gemma3_text": (Gemma3TextConfig, GEMMA3),
}


def write_dense(folder: Path, name: str, **changes: Any) -> Path:
    """The tiny checkpoint of this name."""
    kind, special = DENSE[name]
    return write_checkpoint(folder, kind(**{**COMMON, **special, **changes}))


def write_checkpoint(folder: Path, config: PreTrainedConfig, *, seed: int = 0) -> Path:
    """A Hugging Face directory with float32 weights that are functions of the seed, by numpy alone."""
    model = AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
            parameter.copy_(_weight(name, noise, parameter))
    model.save_pretrained(folder)
    return folder


def _weight(name: str, noise: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Large enough that logits differ and attention prefers some tokens, small enough that layers, which amplify each
    other's rounding, leave it at 5e-7 of the largest logit."""
    if "norm" in name:  # around 1, or 0 where zero is what leaves a vector as it is
        return start + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    return (0.06 if "layers" in name else 0.2) * noise


def read_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", local_files_only=True
    ).eval()


@torch.no_grad()
def logits_of(model: Any, tokens: np.ndarray) -> torch.Tensor:
    """[length, vocabulary] of one sequence."""
    return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
