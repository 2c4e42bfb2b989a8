"""From a Hugging Face `config.json` to a ModelShape, one function per family, with json alone.

Accepts what transformers 5 writes (`rope_parameters`, `layer_types`) and what came before it. A family not listed in
FAMILIES is refused by name; so is what a listed family's config.json may ask for and its function does not express.
The tensors of each family are in `weights/families/`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_a3po.config.model_shape import Experts, LatentAttention, ModelShape, Rope
from megatron_a3po.config.problem import shown
from megatron_a3po.errors import InputError

Values = dict[str, Any]
REQUIRED_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def read_model_shape(hf_path: str | Path) -> ModelShape:
    """The shape of the model in folder `hf_path`; InputError names the file and everything wrong with it."""
    file = Path(hf_path) / "config.json"
    values = _read_json(file)
    if problems := list(_unsupported(values)):
        raise InputError(f"{file}: {problem}" for problem in problems)
    fields = _common(values) | FAMILIES[values["model_type"]](values)
    return ModelShape(**fields, eos_token_ids=_eos_token_ids(Path(hf_path), values))


# -- the families ------------------------------------------------------------------------------------


def _llama(values: Values) -> Values:
    return {}


def _mistral(values: Values) -> Values:
    return {"windows": _same_window(values, values.get("sliding_window", 4096))}


def _qwen2(values: Values) -> Values:
    return {"add_qkv_bias": True, "windows": _qwen_windows(values)}


def _qwen3(values: Values) -> Values:
    return {"head_dim": values.get("head_dim") or 128, "qk_norm": True, "windows": _qwen_windows(values)}


def _qwen3_moe(values: Values) -> Values:
    num_layers, dense = values["num_hidden_layers"], values.get("mlp_only_layers") or []
    period = values.get("decoder_sparse_step", 1)
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    return {
        "qk_norm": True,
        "windows": _same_window(values, window),
        "sparse_layers": tuple(
            layer not in dense and (layer + 1) % period == 0 for layer in range(num_layers)
        ),
        "experts": Experts(
            num_experts=values.get("num_experts") or values["num_local_experts"],
            top_k=values["num_experts_per_tok"],
            ffn_hidden_size=values["moe_intermediate_size"],
            shared_ffn_hidden_size=None,
            scores="softmax",
            normalize_top_k=bool(values.get("norm_topk_prob", False)),
        ),
    }


def _gemma3_text(values: Values) -> Values:
    num_layers = values["num_hidden_layers"]
    pattern = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or 6
    kinds = values.get("layer_types") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(num_layers)
    ]
    window = values.get("sliding_window", 4096)
    both = values.get("rope_parameters") or {}
    full = both.get("full_attention") or values.get("rope_scaling") or {}
    local = both.get("sliding_attention") or {}
    return {
        "head_dim": values.get("head_dim", 256),
        "rope": _rope({"rope_theta": values.get("rope_theta", 1e6), **full}),
        "local_rope": _rope({"rope_theta": values.get("rope_local_base_freq", 1e4), **local}),
        "qk_norm": True,
        "activation": ACTIVATIONS[values.get("hidden_activation", "gelu_pytorch_tanh")],
        "softmax_scale": values.get("query_pre_attn_scalar", 256) ** -0.5,
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
        "embedding_scale": values["hidden_size"] ** 0.5,
        "zero_centered_norms": True,
        "sandwich_norms": True,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", True)),
    }


def _deepseek_v3(values: Values) -> Values:
    num_layers, dense = values["num_hidden_layers"], values["first_k_dense_replace"]
    ffn = values["moe_intermediate_size"]
    latent = LatentAttention(
        query_rank=values.get("q_lora_rank"),
        key_value_rank=values["kv_lora_rank"],
        plain_head_dim=values["qk_nope_head_dim"],
        rotary_head_dim=values["qk_rope_head_dim"],
        value_head_dim=values["v_head_dim"],
    )
    return {
        "num_query_groups": values["num_attention_heads"],
        "head_dim": latent.query_head_dim,
        "latent_attention": latent,
        "sparse_layers": tuple(layer >= dense for layer in range(num_layers)),
        "experts": Experts(
            num_experts=values["n_routed_experts"],
            top_k=values["num_experts_per_tok"],
            ffn_hidden_size=ffn,
            shared_ffn_hidden_size=ffn * values["n_shared_experts"],
            scores="sigmoid",
            normalize_top_k=True,
            scaling=float(values.get("routed_scaling_factor", 2.5)),
            num_groups=values["n_group"],
            top_groups=values["topk_group"],
            has_score_bias=True,
        ),
    }


FAMILIES: dict[str, Callable[[Values], Values]] = {
    "deepseek_v3": _deepseek_v3,
    "gemma3_text": _gemma3_text,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}

# Of the families with experts: whole numbers there must be, and the only values there may be.
WITH_EXPERTS = {
    "deepseek_v3": (
        "n_routed_experts",
        "n_shared_experts",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ),
    "qwen3_moe": ("num_experts",),
}
ONLY = {
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
    },
    "qwen3_moe": {},
}


# -- what they have in common ------------------------------------------------------------------------


def _common(values: Values) -> Values:
    num_heads = values["num_attention_heads"]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return {
        "model_type": values["model_type"],
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": values["intermediate_size"],
        "num_attention_heads": num_heads,
        "num_query_groups": values.get("num_key_value_heads") or num_heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // num_heads,
        "vocab_size": values["vocab_size"],
        "max_position_embeddings": values.get("max_position_embeddings", 32768),
        "rope": _rope({"rope_theta": values.get("rope_theta", 10000.0), **rope}),
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "initializer_range": float(values.get("initializer_range", 0.02)),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
    }


def _rope(parameters: Values) -> Rope:
    # Gemma 3 has one such mapping for each kind of layer, which its own function reads.
    kind: Any = parameters.get("rope_type", parameters.get("type", "default"))
    names = ("rope_theta", "rope_type", "type", "full_attention", "sliding_attention")
    scaling = {key: value for key, value in parameters.items() if key not in names and value is not None}
    return Rope(float(parameters["rope_theta"]), kind, scaling if kind != "default" else {})


def _same_window(values: Values, window: int | None) -> tuple[int | None, ...]:
    return () if window is None else (window,) * values["num_hidden_layers"]


def _qwen_windows(values: Values) -> tuple[int | None, ...]:
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    if window is None:
        return ()
    first = values.get("max_window_layers", 28)
    kinds = values.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(values["num_hidden_layers"])
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# -- what is refused ---------------------------------------------------------------------------------


def _unsupported(values: Values) -> Iterator[str]:
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        yield f"model_type is {shown(model_type)}, but only these are supported: {', '.join(FAMILIES)}."
    else:
        for key in REQUIRED_KEYS:
            if not isinstance(values.get(key), int):
                yield f"{key} is {shown(values.get(key))}, but must be a whole number."
    if model_type in WITH_EXPERTS:
        yield from _unsupported_experts(values)
    else:
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"):
            if values.get(key):
                yield f"{key} is {shown(values[key])}, but the family {shown(model_type)} has no experts here."
    for key, value in values.items():
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, int | float) and value != 0:
            yield f"{key} is {shown(value)}: a model with dropout is not supported, set it to 0.0."
    wanted = "gelu_pytorch_tanh" if model_type == "gemma3_text" else "silu"
    for key in ("hidden_act", "hidden_activation"):
        if values.get(key, wanted) != wanted:
            yield f"{key} is {shown(values[key])}, but only {wanted} is supported."
    for key in ("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping",
                "use_bidirectional_attention", "quantization_config"):  # fmt: skip
        if values.get(key):
            yield f"{key} is {shown(values[key])}, which is not supported: take a model without it."
    if model_type == "mistral" and values.get("layer_types"):
        yield 'layer_types is given, but the family "mistral" has one kind of layer: take the key out.'
    kinds, known = values.get("layer_types") or [], ("full_attention", "sliding_attention")
    for kind in sorted(set(kinds).difference(known)):
        yield f"layer_types has {shown(kind)}, but only these are supported: {', '.join(known)}."
    if kinds and len(kinds) != values.get("num_hidden_layers"):
        yield f"layer_types has {len(kinds)} entries, but num_hidden_layers is {values.get('num_hidden_layers')}."
    if values.get("rope_interleave") is False:
        yield "rope_interleave is false, but only interleaved rotary dimensions are supported for this family."
    yield from _unsupported_rope(values)


def _unsupported_experts(values: Values) -> Iterator[str]:
    family = values["model_type"]
    values = {"num_experts": values.get("num_local_experts"), **values}
    keys = ("num_experts_per_tok", "moe_intermediate_size", *WITH_EXPERTS[family])
    missing = [key for key in keys if not isinstance(values.get(key), int)]
    for key in missing:
        yield f"{key} is {shown(values.get(key))}, but must be a whole number."
    for key, wanted in ONLY[family].items():
        if values.get(key, wanted) != wanted:
            yield f"{key} is {shown(values[key])}, but only {shown(wanted)} is supported for this family."
    if missing:
        return
    top_k = values["num_experts_per_tok"]
    if top_k < 2 and values.get("norm_topk_prob", family == "deepseek_v3"):
        yield f"num_experts_per_tok is {top_k}, but must be at least 2 where their scores are normalised."
    if family == "deepseek_v3":
        if values["n_shared_experts"] < 1:
            yield f"n_shared_experts is {values['n_shared_experts']}, but must be at least 1."
        # Megatron-Core rates a group by its best top_k / topk_group experts, transformers by its best two.
        if values["topk_group"] != values["n_group"] and top_k != 2 * values["topk_group"]:
            yield (
                f"num_experts_per_tok is {top_k}, but only twice topk_group ({2 * values['topk_group']}) is supported "
                "where experts are chosen within groups."
            )


def _unsupported_rope(values: Values) -> Iterator[str]:
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    nested = [given[kind] for kind in ("full_attention", "sliding_attention") if kind in given]
    for rope in nested or [given]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        supported = [k for k in ROPE_KEYS if k != "yarn" or values.get("model_type") == "deepseek_v3"]
        if kind not in supported:
            yield f"the RoPE type is {shown(kind)}, but only these are supported: {', '.join(supported)}."
            continue
        for key in ROPE_KEYS[kind]:
            if rope.get(key) is None:
                yield f"the RoPE type is {shown(kind)}, but its {key} is missing."
    for where in (values, given, *nested):
        if where.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"partial_rotary_factor is {shown(where['partial_rotary_factor'])}, but only 1.0 is supported."


def _read_json(file: Path) -> Values:
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


def _eos_token_ids(folder: Path, values: Values) -> tuple[int, ...]:
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
