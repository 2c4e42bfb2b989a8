"""The shape of a model, read from what transformers writes and wrote."""

import json
from pathlib import Path

import pytest

from megatron_a3po.config import ModelShape, read_model_shape
from megatron_a3po.config.model_shape import Rope
from megatron_a3po.errors import InputError
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
    assert read_model_shape(write_model(tmp_path, num_key_value_heads=None)).num_query_groups == 4


def test_every_token_that_ends_a_response(tmp_path: Path):
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_model_shape(tmp_path).eos_token_ids == (2, 5)
    (tmp_path / "generation_config.json").unlink()
    assert read_model_shape(write_model(tmp_path, eos_token_id=None)).eos_token_ids == ()


def test_as_transformers_writes_it(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=99
    )
    config.save_pretrained(tmp_path)
    shape = read_model_shape(tmp_path)
    assert (shape.vocab_size, shape.head_dim, shape.num_layers) == (99, 16, config.num_hidden_layers)
    assert shape.rope.theta == config.rope_parameters["rope_theta"]
    assert shape.norm_eps == config.rms_norm_eps


def test_refusal_names_the_file_and_everything_wrong(tmp_path: Path):
    write_model(tmp_path, model_type="mixtral", num_local_experts=8, attention_dropout=0.1)
    with pytest.raises(InputError) as caught:
        read_model_shape(tmp_path)
    assert len(caught.value.problems) == 3
    assert all(problem.startswith(f"{tmp_path}/config.json: ") for problem in caught.value.problems)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_unreadable(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_model_shape(tmp_path)
