"""What a config.json may ask for and the families here do not express: one sentence for each.

Types and ranges of the keys come before, in `model_keys.py`. Values that are only refused, and never read, are looked
at as they are.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_a3po.config.model_keys import DeepseekV3Keys, ModelKeys, Qwen3MoeKeys, RopeKeys
from megatron_a3po.config.problem import shown

Values = dict[str, Any]
WITH_EXPERTS = ("deepseek_v3", "qwen3_moe")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
LAYER_KINDS = ("full_attention", "sliding_attention")
# The only values there may be.
ONLY = {
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
    },
}


def family_problems(values: Values, families: Iterable[str]) -> Iterator[str]:
    """That the family is none of `families`."""
    model_type = values.get("model_type")
    if model_type not in list(families):
        # The folder of a model that also sees has the text model's keys a level down.
        sees = ", a model of more than text (it has a text_config)" if "text_config" in values else ""
        yield f"model_type is {shown(model_type)}{sees}, but only these are supported: {', '.join(families)}."


def plain_problems(values: Values) -> Iterator[str]:
    """Of keys whose value alone says it, whatever its type."""
    model_type = values.get("model_type")
    if model_type not in WITH_EXPERTS:
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"):
            if values.get(key):
                yield f"{key} is {shown(values[key])}, but the family {shown(model_type)} has no experts here."
    for key, value in values.items():
        if ("dropout" in key or key.endswith("_pdrop")) and value not in (0, None):
            yield f"{key} is {shown(value)}: a model with dropout is not supported, set it to 0.0."
    activation = "gelu_pytorch_tanh" if model_type == "gemma3_text" else "silu"
    for key in ("hidden_act", "hidden_activation"):
        if values.get(key, activation) != activation:
            yield f"{key} is {shown(values[key])}, but only {activation} is supported."
    for key in ("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping",
                "use_bidirectional_attention", "quantization_config"):  # fmt: skip
        if values.get(key):
            yield f"{key} is {shown(values[key])}, which is not supported: take a model without it."
    if values.get("rope_interleave") is False:
        yield "rope_interleave is false, but only interleaved rotary dimensions are supported for this family."
    for key, only in (ONLY.get(model_type, {}) if isinstance(model_type, str) else {}).items():
        if values.get(key, only) != only:
            yield f"{key} is {shown(values[key])}, but only {shown(only)} is supported for this family."
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    nested = [rope, *(rope.get(kind) for kind in LAYER_KINDS)] if isinstance(rope, dict) else []
    for where in (values, *nested):
        if isinstance(where, dict) and where.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"partial_rotary_factor is {shown(where['partial_rotary_factor'])}, but only 1.0 is supported."


def layer_problems(keys: ModelKeys, values: Values) -> Iterator[str]:
    """Of keys that do not go together, or of which this family has less."""
    yield from _of_heads(keys, values)
    kinds = keys.layer_types or []
    if values["model_type"] == "mistral" and kinds:
        yield 'layer_types is given, but the family "mistral" has one kind of layer: take the key out.'
    for kind in sorted(set(kinds).difference(LAYER_KINDS)):
        yield f"layer_types has {shown(kind)}, but only these are supported: {', '.join(LAYER_KINDS)}."
    if kinds and len(kinds) != keys.num_hidden_layers:
        yield f"layer_types has {len(kinds)} entries, but num_hidden_layers is {keys.num_hidden_layers}."
    if isinstance(keys, DeepseekV3Keys | Qwen3MoeKeys):
        yield from _of_experts(keys)
    rope = keys.rope_parameters or keys.rope_scaling or RopeKeys()
    for one in [one for one in (rope.full_attention, rope.sliding_attention) if one] or [rope]:
        yield from _of_rope(one, with_yarn=isinstance(keys, DeepseekV3Keys))


def _of_heads(keys: ModelKeys, values: Values) -> Iterator[str]:
    num_heads, num_groups = keys.num_attention_heads, keys.num_key_value_heads
    if isinstance(keys, DeepseekV3Keys):  # attention is latent: every head has its own keys and values
        if keys.qk_rope_head_dim % 2:
            yield f"qk_rope_head_dim is {keys.qk_rope_head_dim}, but must be even."
        return
    if num_groups and num_heads % num_groups:
        default = "" if "num_key_value_heads" in values else " (the family's default, as the key is missing)"
        yield f"num_key_value_heads is {num_groups}{default}, but must divide num_attention_heads, {num_heads}."
    if keys.head_dim is None and keys.hidden_size % (2 * num_heads):
        yield (
            f"hidden_size is {keys.hidden_size}, but without head_dim must be a multiple of twice "
            f"num_attention_heads, {num_heads}."
        )
    elif keys.head_dim and keys.head_dim % 2:
        yield f"head_dim is {keys.head_dim}, but must be even."


def _of_experts(keys: DeepseekV3Keys | Qwen3MoeKeys) -> Iterator[str]:
    top_k = keys.num_experts_per_tok
    latent = isinstance(keys, DeepseekV3Keys)
    num_experts = keys.n_routed_experts if latent else keys.num_experts
    if top_k > num_experts:
        yield f"num_experts_per_tok is {top_k}, but the model has only {num_experts} experts."
    if top_k < 2 and (latent or keys.norm_topk_prob):
        yield f"num_experts_per_tok is {top_k}, but must be at least 2 where their scores are normalised."
    if latent:
        if keys.n_routed_experts % keys.n_group:
            yield f"n_group is {keys.n_group}, but must divide n_routed_experts, {keys.n_routed_experts}."
        # Megatron-Core rates a group by its best top_k / topk_group experts, transformers by its best two.
        if keys.topk_group != keys.n_group and top_k != 2 * keys.topk_group:
            yield (
                f"num_experts_per_tok is {top_k}, but only twice topk_group ({2 * keys.topk_group}) is supported "
                "where experts are chosen within groups."
            )


def _of_rope(rope: RopeKeys, *, with_yarn: bool) -> Iterator[str]:
    given = rope.given()
    kind = given.get("rope_type", given.get("type", "default"))
    supported = [name for name in ROPE_KEYS if name != "yarn" or with_yarn]
    if kind not in supported:
        yield f"the RoPE type is {shown(kind)}, but only these are supported: {', '.join(supported)}."
        return
    for key in ROPE_KEYS[kind]:
        if key not in given:
            yield f"the RoPE type is {shown(kind)}, but its {key} is missing."
