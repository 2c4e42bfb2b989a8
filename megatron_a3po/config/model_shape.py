"""The shape of a Hugging Face model, read from its config.json with json alone.

Accepts transformers 5 (`rope_parameters`) and what came before it (`rope_theta`). What the actor cannot
compute is refused here by name: other architectures, experts, dropout, scaled RoPE, sliding windows.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a3po.config.problem import shown
from megatron_a3po.errors import InputError

SUPPORTED_MODEL_TYPES = ("qwen2",)
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
REQUIRED_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelShape:
    """What a model's layers look like; all that the actor's construction depends on."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    add_qkv_bias: bool
    eos_token_ids: tuple[int, ...]


def read_model_shape(hf_path: str | Path) -> ModelShape:
    """The shape of the model in folder `hf_path`; InputError names the file and everything wrong with it."""
    file = Path(hf_path) / "config.json"
    values = _read_json(file)
    if problems := _unsupported(values):
        raise InputError(f"{file}: {problem}" for problem in problems)
    num_heads = values["num_attention_heads"]
    return ModelShape(
        model_type=values["model_type"],
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=num_heads,
        num_query_groups=values.get("num_key_value_heads") or num_heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
        vocab_size=values["vocab_size"],
        max_position_embeddings=values.get("max_position_embeddings", 32768),
        rope_theta=float(_rope(values).get("rope_theta", values.get("rope_theta", 10000.0))),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        initializer_range=float(values.get("initializer_range", 0.02)),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        add_qkv_bias=True,  # qwen2: query, key and value have biases, the output projection has none
        eos_token_ids=_eos_token_ids(Path(hf_path), values),
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise InputError(
            f"{file.parent} is not a folder: give the local folder of a Hugging Face checkpoint (download "
            "it first)."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing: give the folder of a Hugging Face checkpoint.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object: it is not the config.json of a model.")
    return values


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {}


def _unsupported(values: dict[str, Any]) -> list[str]:
    problems = []
    model_type = values.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        problems.append(f"model_type is {shown(model_type)}, but only these are supported: {known}.")
    for key in EXPERT_KEYS:
        if values.get(key):
            problems.append(
                f"{key} is {shown(values[key])}: models with experts are not supported, take a dense one."
            )
    for key, value in values.items():
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, int | float) and value != 0:
            problems.append(f"{key} is {shown(value)}: a model with dropout is not supported, set it to 0.0.")
    for key in REQUIRED_KEYS:
        if model_type in SUPPORTED_MODEL_TYPES and not isinstance(values.get(key), int):
            problems.append(f"{key} is {shown(values.get(key))}, but must be a whole number.")
    if values.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {shown(values['hidden_act'])}, but only silu is supported.")
    if values.get("use_sliding_window"):
        problems.append(
            "use_sliding_window is true: sliding-window attention is not supported, take a model without."
        )
    rope = _rope(values)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        problems.append(
            f"the RoPE type is {shown(rope_type)}, but only default (unscaled) RoPE is supported."
        )
    return problems


def _eos_token_ids(folder: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Every token that ends a response: generation_config.json often knows more of them than config.json."""
    found: list[int] = []
    sources = [values]
    generation = folder / "generation_config.json"
    if generation.is_file():
        sources.append(_read_json(generation))
    for source in sources:
        token_ids = source.get("eos_token_id")
        found += token_ids if isinstance(token_ids, list) else [] if token_ids is None else [token_ids]
    return tuple(dict.fromkeys(found))
