"""The shape of a model, read from what transformers writes and wrote."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.config import Config, ModelShape, read_model_shape
from megatron_a3po.config.model_families import FAMILIES
from megatron_a3po.config.model_shape import Experts, LatentAttention, Rope
from megatron_a3po.errors import ConfigError, InputError
from tests.run_files import write_model


def test_all_fields(tmp_path: Path):
    assert read_model_shape(write_model(tmp_path)) == ModelShape(
        model_type="qwen2",
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        vocab_size=30,
        max_position_embeddings=256,
        rope=Rope(),
        norm_eps=1e-6,
        tie_word_embeddings=True,
        add_qkv_bias=True,
        eos_token_ids=(2,),
        initializer_range=0.02,
    )


def test_rope_of_before_and_after_transformers_5(tmp_path: Path):
    newer = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    older = {"rope_parameters": None, "rope_theta": 1e6}
    assert read_model_shape(write_model(tmp_path, **newer)).rope.theta == 1e6
    assert read_model_shape(write_model(tmp_path, **older)).rope.theta == 1e6


def test_head_dim_and_groups_that_are_not_written(tmp_path: Path):
    assert read_model_shape(write_model(tmp_path, head_dim=32)).head_dim == 32
    llama = write_model(tmp_path, model_type="llama", num_key_value_heads=None)
    assert read_model_shape(llama).num_query_groups == 4


def test_every_token_that_ends_a_response(tmp_path: Path):
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_model_shape(tmp_path).eos_token_ids == (2, 5)
    (tmp_path / "generation_config.json").unlink()
    assert read_model_shape(write_model(tmp_path, eos_token_id=None)).eos_token_ids == ()


# What the families' first models have in their config.json, as their authors wrote it, and what is special in it.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 8}
AS_PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 2": (
        {"model_type": "llama", "num_key_value_heads": 4, "rope_scaling": None, "rms_norm_eps": 1e-5},
        {"rope": Rope(1e4), "norm_eps": 1e-5, "num_query_groups": 4},
    ),
    "Llama 3.1": (
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
            "rope_theta": 500000.0,
            "eos_token_id": [8, 9],
        },
        {"rope": Rope(5e5, "llama3", LLAMA3), "eos_token_ids": (8, 9)},
    ),
    "Llama, long": (
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope": Rope(1e4, "linear", {"factor": 4.0})},
    ),
    "Mistral 0.1": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4096, "rope_theta": 10000.0},
        {"windows": (4096,) * 8},
    ),
    "Mistral 0.3": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6},
        {"windows": (), "rope": Rope(1e6)},
    ),
    "Mistral without a word on windows": (
        {"model_type": "mistral", "num_key_value_heads": 2},
        {"windows": (4096,) * 8},
    ),
    "Qwen2.5": (
        {
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 4,
        },
        {"windows": (), "add_qkv_bias": True},
    ),
    "Qwen2 with a window": (
        {
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 32,
            "max_window_layers": 6,
        },
        {"windows": (None,) * 6 + (32,) * 2},
    ),
    "Qwen3": (
        {
            "model_type": "qwen3",
            "num_key_value_heads": 2,
            "head_dim": 128,
            "use_sliding_window": False,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
        },
        {"head_dim": 128, "qk_norm": True, "windows": (), "tie_word_embeddings": True, "rope": Rope(1e6)},
    ),
    "Gemma 3 1B": (
        {
            "model_type": "gemma3_text",
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        {
            "windows": (512,) * 5 + (None,) + (512,) * 2,
            "rope": Rope(1e6),
            "local_rope": Rope(1e4),
            "softmax_scale": 1 / 16,
            "embedding_scale": 8.0,
            "activation": "gelu_tanh",
            "qk_norm": True,
            "sandwich_norms": True,
            "zero_centered_norms": True,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 3 4B": (
        {
            "model_type": "gemma3_text",
            "num_key_value_heads": 2,
            "head_dim": 256,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1000000.0,
            "sliding_window": 1024,
            "sliding_window_pattern": 3,
        },
        {
            "windows": (1024, 1024, None, 1024, 1024, None, 1024, 1024),
            "rope": Rope(1e6, "linear", {"factor": 8.0}),
            "local_rope": Rope(1e4),
        },
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 48,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.001,
        },
        {
            "qk_norm": True,
            "sparse_layers": (True,) * 8,
            "experts": Experts(128, 8, 32, None, "softmax", normalize_top_k=True),
        },
    ),
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "first_k_dense_replace": 3,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 32,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 8,
            "num_nextn_predict_layers": 1,
            "rope_theta": 10000,
            "rope_scaling": {**YARN, "type": "yarn"},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
        },
        {
            "sparse_layers": (False,) * 3 + (True,) * 5,
            "head_dim": 192,
            "latent_attention": LatentAttention(1536, 512, 128, 64, 128),
            "rope": Rope(1e4, "yarn", YARN),
            "experts": Experts(256, 8, 32, 32, "sigmoid", True, 2.5, 8, 4, has_score_bias=True),
        },
    ),
}


@pytest.mark.parametrize("model", AS_PUBLISHED)
def test_as_published_and_as_transformers_writes_it_again(tmp_path: Path, model: str):
    written, special = AS_PUBLISHED[model]
    values = {**SMALL, "vocab_size": 99, "max_position_embeddings": 256, **written}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = read_model_shape(tmp_path)
    assert {name: getattr(shape, name) for name in special} == special
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    config.save_pretrained(tmp_path / "again")
    again = read_model_shape(tmp_path / "again")
    # A config.json that names no end of a response gets its family's from transformers, not from here.
    assert replace(again, eos_token_ids=shape.eos_token_ids) == shape
    assert not shape.eos_token_ids or again.eos_token_ids == shape.eos_token_ids
    assert (again.norm_eps, again.initializer_range) == (config.rms_norm_eps, config.initializer_range)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            'the RoPE type is "yarn"',
        ),
        ({"rope_parameters": {**LLAMA3, "rope_type": "llama3", "factor": None}}, "but its factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1.0"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, but num_hidden_layers is 4"),
        ({"layer_types": ["chunked_attention"] * 4}, 'layer_types has "chunked_attention"'),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "one kind of layer"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"model_type": "gemma3_text", "hidden_act": "silu"}, "only gelu_pytorch_tanh is supported"),
        (
            {"model_type": "gemma3_text", "hidden_act": None, "final_logit_softcapping": 30.0},
            "softcapping is 30.0",
        ),
        ({**QWEN3_MOE, "num_experts": None}, "num_experts is missing"),
        ({**QWEN3_MOE, "num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok is 1"),
        ({**DEEPSEEK, "topk_group": 2}, "only twice topk_group (4) is supported"),
        ({**DEEPSEEK, "n_shared_experts": 0}, "n_shared_experts is 0"),
        ({**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank is missing, but must be a whole number"),
        ({**DEEPSEEK, "scoring_func": "softmax"}, 'scoring_func is "softmax", but only "sigmoid"'),
        ({**DEEPSEEK, "norm_topk_prob": False}, "norm_topk_prob is false, but only true"),
        (
            {**DEEPSEEK, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "its original_max_position_embeddings is missing",
        ),
        ({**DEEPSEEK, "n_group": 3, "topk_group": 3}, "n_group is 3, but must divide n_routed_experts, 16"),
        (
            {**QWEN3_MOE, "num_experts_per_tok": 9},
            "num_experts_per_tok is 9, but the model has only 8 experts",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, but must divide num_attention_heads, 4"),
        (
            {"num_key_value_heads": None},
            "num_key_value_heads is 32 (the family's default, as the key is missing), but must divide",
        ),
        ({"hidden_size": 66}, "hidden_size is 66, but without head_dim must be a multiple of twice"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            'model_type is "gemma3", a model of more than text (it has a text_config), but only these are '
            "supported: deepseek_v3, gemma3_text, llama,",
        ),
    ],
    ids=str,
)
def test_what_a_family_does_not_express_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], sentence: str
):
    with pytest.raises(InputError) as caught:
        read_model_shape(write_model(tmp_path, **changes))
    (problem,) = caught.value.problems
    assert sentence in problem


ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_attention_heads", 0, "at least 1"),
        ("num_attention_heads", True, "a whole number"),
        ("num_hidden_layers", 4.5, "a whole number"),
        ("vocab_size", -1, "at least 1"),
        ("num_key_value_heads", "2", "a whole number"),
        ("max_position_embeddings", None, "a whole number"),
        ("rms_norm_eps", "x", "a number"),
        ("rms_norm_eps", float("inf"), "a finite number"),
        ("initializer_range", -0.1, "at least 0"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("rope_theta", 0, "greater than 0"),
        ("rope_parameters", "x", "a section with keys of its own"),
        ("rope_parameters.rope_theta", None, "a number"),
        ("rope_parameters.rope_type", ["linear"], "text (in quotes if it looks like a number)"),
        ("rope_parameters.factor", "8", "a number"),
        ("layer_types", 5, "a list"),
        ("sliding_window", "x", "a whole number"),
        ("use_sliding_window", 1, "true or false"),
        ("max_window_layers", -1, "at least 0"),
        ("eos_token_id", "</s>", "a whole number"),
    ],
)
def test_a_value_of_another_type_or_range_is_named_with_what_was_wanted(
    tmp_path: Path, key: str, value: Any, wanted: str
):
    write_model(tmp_path, rope_parameters=ROPE)
    values = json.loads((tmp_path / "config.json").read_text())
    *section, last = key.split(".")
    (values[section[0]] if section else values)[last] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_model_shape(tmp_path)
    place = f"{key}.0" if key == "eos_token_id" else key
    found = json.dumps(value)
    assert caught.value.problems == [f"{tmp_path}/config.json: {place} is {found}, but must be {wanted}."]


@pytest.mark.parametrize("model_type", [["qwen2"], {"a": 1}, None, 5])
def test_a_family_that_is_no_name(tmp_path: Path, model_type: Any):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "attention_dropout": "0.1"}))
    with pytest.raises(InputError) as caught:
        read_model_shape(tmp_path)
    family, dropout = caught.value.problems
    assert f"model_type is {json.dumps(model_type)}, but only these are supported: deepseek_v3" in family
    assert 'attention_dropout is "0.1": a model with dropout' in dropout


def test_what_generation_config_says_wrongly(tmp_path: Path):
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(
        InputError, match=r'generation_config\.json: eos_token_id\.0 is "</s>", but must be a whole'
    ):
        read_model_shape(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_key_is_missing_the_default_of_transformers_holds(tmp_path: Path, family: str):
    transformers = pytest.importorskip("transformers")
    kind, _ = FAMILIES[family]
    # Every key that has a default here is left out, and written by transformers with its own.
    sizes = {name for name, field in kind.model_fields.items() if field.is_required()}
    standard = transformers.AutoConfig.for_model(family).to_dict()
    standard["num_experts"] = standard.get("num_local_experts")
    one_choice = {
        "n_group": 8,
        "topk_group": 8,
    }  # of experts among all, as choosing within groups is restricted here
    values = {key: value for key, value in (standard | one_choice).items() if key in sizes}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **values}))
    shape = read_model_shape(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert replace(read_model_shape(tmp_path), eos_token_ids=()) == shape
    assert shape.max_position_embeddings == config.max_position_embeddings
    if shape.latent_attention is None:
        assert shape.num_query_groups == config.num_key_value_heads
    else:
        assert shape.latent_attention.query_rank == config.q_lora_rank == 1536


def test_refusal_names_the_file_and_everything_wrong(tmp_path: Path):
    write_model(tmp_path, model_type="mixtral", num_local_experts=8, attention_dropout=0.1)
    with pytest.raises(InputError) as caught:
        read_model_shape(tmp_path)
    assert len(caught.value.problems) == 3
    assert all(problem.startswith(f"{tmp_path}/config.json: ") for problem in caught.value.problems)


def test_gemma_under_transformer_engine_is_refused(load: Callable[..., Config], run_file: Path):
    write_model(run_file.parent / "model", model_type="gemma3_text", hidden_act=None)
    assert load().actor.transformer_impl == "auto"
    with pytest.raises(ConfigError) as caught:
        load("actor.transformer_impl=transformer_engine")
    assert any("norms of gemma3_text behind attention" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_unreadable(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_model_shape(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "config.json").symlink_to("/proc/self/mem")  # a file whose reading fails, for root too
    with pytest.raises(InputError, match=r"config\.json is not readable as JSON .*Input/output error"):
        read_model_shape(tmp_path)
