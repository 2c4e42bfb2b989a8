"""From a Hugging Face `config.json` to a ModelShape, one function per family, with json alone.

Accepts what transformers 5 writes (`rope_parameters`, `layer_types`) and what came before it. A family not listed in
FAMILIES is refused by name; so is what a listed family's config.json may ask for and its function does not express
(`model_refusals.py`). The keys with their types and defaults are in `model_keys.py`, the tensors of each family in
`weights/families/`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_a3po.config import model_keys
from megatron_a3po.config.json_file import read_json_object
from megatron_a3po.config.model_keys import GenerationKeys, ModelKeys, read_keys
from megatron_a3po.config.model_refusals import family_problems, layer_problems, plain_problems
from megatron_a3po.config.model_shape import Experts, LatentAttention, ModelShape, Rope
from megatron_a3po.errors import InputError

Values = dict[str, Any]


def read_model_shape(hf_path: str | Path) -> ModelShape:
    """The shape of the model in folder `hf_path`; InputError names the file and everything wrong with it."""
    folder = Path(hf_path)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder: give the local folder of a Hugging Face checkpoint (download it first)."
        )
    values = read_json_object(folder / "config.json", "give the folder of a Hugging Face checkpoint")
    problems = [*family_problems(values, FAMILIES), *plain_problems(values)]
    keys = None
    if values.get("model_type") in list(FAMILIES):
        kind, special = FAMILIES[values["model_type"]]
        try:
            keys = read_keys(kind, values)
            problems += layer_problems(keys, values)
        except InputError as error:
            problems += error.problems
        if keys is not None and not problems:
            fields = {"model_type": values["model_type"], **_common(keys), **special(keys)}
            return ModelShape(**fields, eos_token_ids=_eos_token_ids(folder, keys))
    raise InputError(f"{folder / 'config.json'}: {problem}" for problem in problems)


# -- the families ------------------------------------------------------------------------------------


def _llama(keys: model_keys.LlamaKeys) -> Values:
    return {}


def _mistral(keys: model_keys.MistralKeys) -> Values:
    return {"windows": _same_window(keys, keys.sliding_window)}


def _qwen2(keys: model_keys.Qwen2Keys) -> Values:
    return {"add_qkv_bias": True, "windows": _qwen_windows(keys)}


def _qwen3(keys: model_keys.Qwen3Keys) -> Values:
    return {"qk_norm": True, "windows": _qwen_windows(keys)}


def _qwen3_moe(keys: model_keys.Qwen3MoeKeys) -> Values:
    dense, period = keys.mlp_only_layers or [], keys.decoder_sparse_step
    return {
        "qk_norm": True,
        "windows": _same_window(keys, keys.sliding_window if keys.use_sliding_window else None),
        "sparse_layers": tuple(
            layer not in dense and (layer + 1) % period == 0 for layer in range(keys.num_hidden_layers)
        ),
        "experts": Experts(
            num_experts=keys.num_experts,
            top_k=keys.num_experts_per_tok,
            ffn_hidden_size=keys.moe_intermediate_size,
            shared_ffn_hidden_size=None,
            scores="softmax",
            normalize_top_k=keys.norm_topk_prob,
        ),
    }


def _gemma3_text(keys: model_keys.Gemma3Keys) -> Values:
    kinds = keys.layer_types or [
        "full_attention" if (layer + 1) % keys.sliding_window_pattern == 0 else "sliding_attention"
        for layer in range(keys.num_hidden_layers)
    ]
    both = keys.rope_parameters
    full = (both and both.full_attention) or keys.rope_scaling
    return {
        "rope": _rope(keys.rope_theta, full),
        "local_rope": _rope(keys.rope_local_base_freq, both and both.sliding_attention),
        "qk_norm": True,
        "activation": "gelu_tanh",
        "softmax_scale": keys.query_pre_attn_scalar**-0.5,
        "windows": tuple(keys.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        "embedding_scale": keys.hidden_size**0.5,
        "zero_centered_norms": True,
        "sandwich_norms": True,
    }


def _deepseek_v3(keys: model_keys.DeepseekV3Keys) -> Values:
    latent = LatentAttention(
        query_rank=keys.q_lora_rank,
        key_value_rank=keys.kv_lora_rank,
        plain_head_dim=keys.qk_nope_head_dim,
        rotary_head_dim=keys.qk_rope_head_dim,
        value_head_dim=keys.v_head_dim,
    )
    return {
        "num_query_groups": keys.num_attention_heads,
        "head_dim": latent.query_head_dim,
        "latent_attention": latent,
        "sparse_layers": tuple(
            layer >= keys.first_k_dense_replace for layer in range(keys.num_hidden_layers)
        ),
        "experts": Experts(
            num_experts=keys.n_routed_experts,
            top_k=keys.num_experts_per_tok,
            ffn_hidden_size=keys.moe_intermediate_size,
            shared_ffn_hidden_size=keys.moe_intermediate_size * keys.n_shared_experts,
            scores="sigmoid",
            normalize_top_k=True,
            scaling=keys.routed_scaling_factor,
            num_groups=keys.n_group,
            top_groups=keys.topk_group,
            has_score_bias=True,
        ),
    }


FAMILIES: dict[str, tuple[type[ModelKeys], Callable[[Any], Values]]] = {
    "deepseek_v3": (model_keys.DeepseekV3Keys, _deepseek_v3),
    "gemma3_text": (model_keys.Gemma3Keys, _gemma3_text),
    "llama": (model_keys.LlamaKeys, _llama),
    "mistral": (model_keys.MistralKeys, _mistral),
    "qwen2": (model_keys.Qwen2Keys, _qwen2),
    "qwen3": (model_keys.Qwen3Keys, _qwen3),
    "qwen3_moe": (model_keys.Qwen3MoeKeys, _qwen3_moe),
}


# -- what they have in common ------------------------------------------------------------------------


def _common(keys: ModelKeys) -> Values:
    num_heads = keys.num_attention_heads
    return {
        "num_layers": keys.num_hidden_layers,
        "hidden_size": keys.hidden_size,
        "ffn_hidden_size": keys.intermediate_size,
        "num_attention_heads": num_heads,
        "num_query_groups": keys.num_key_value_heads or num_heads,
        "head_dim": keys.head_dim or keys.hidden_size // num_heads,
        "vocab_size": keys.vocab_size,
        "max_position_embeddings": keys.max_position_embeddings,
        "rope": _rope(keys.rope_theta, keys.rope_parameters or keys.rope_scaling),
        "norm_eps": keys.rms_norm_eps,
        "initializer_range": keys.initializer_range,
        "tie_word_embeddings": keys.tie_word_embeddings,
    }


def _rope(theta: float, keys: model_keys.RopeKeys | None) -> Rope:
    given = {} if keys is None else keys.given()
    kind: Any = given.get("rope_type", given.get("type", "default"))
    # Gemma 3 has one such mapping for each kind of layer, which its own function reads.
    names = ("rope_theta", "rope_type", "type", "full_attention", "sliding_attention")
    scaling = {key: value for key, value in given.items() if key not in names}
    return Rope(float(given.get("rope_theta", theta)), kind, scaling if kind != "default" else {})


def _same_window(keys: ModelKeys, window: int | None) -> tuple[int | None, ...]:
    return () if window is None else (window,) * keys.num_hidden_layers


def _qwen_windows(keys: model_keys.Qwen2Keys) -> tuple[int | None, ...]:
    window = keys.sliding_window if keys.use_sliding_window else None
    if window is None:
        return ()
    kinds = keys.layer_types or [
        "sliding_attention" if layer >= keys.max_window_layers else "full_attention"
        for layer in range(keys.num_hidden_layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos_token_ids(folder: Path, keys: ModelKeys) -> tuple[int, ...]:
    """Every token that ends a response: generation_config.json often knows more of them than config.json."""
    found = keys.eos_token_id
    file = folder / "generation_config.json"
    if file.is_file():
        values = read_json_object(file, "copy it there anew, or remove it")
        try:
            found = found + read_keys(GenerationKeys, values).eos_token_id
        except InputError as error:
            raise InputError(f"{file}: {problem}" for problem in error.problems) from None
    return tuple(dict.fromkeys(found))
