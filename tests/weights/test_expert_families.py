"""The families with experts: transformers' logits and, bit for bit, its tensors, with experts spread over ranks too."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.checkpoint import load_weights
from megatron_a3po.actor.grid import build_grid
from megatron_a3po.actor.model import transformer_config
from megatron_a3po.config import load_config, read_model_shape
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.errors import ConfigError, InputError
from megatron_a3po.weights.families import table_of
from megatron_a3po.weights.megatron_checkpoint import Ranks, write_megatron_checkpoint
from megatron_a3po.weights.megatron_reader import MegatronReader
from megatron_a3po.weights.sources import SafetensorsSource
from tests.actor.ranks import on_actors, random_sequences
from tests.run_files import write_run
from tests.weights.test_round_trip import assert_identical, tensors_of

VOCAB_SIZE = 99
LENGTHS = [3, 17, 12, 8]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp 2": {"tp": 2},
    "tp 2 sp pp 2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "ep 2": {"dp": 2, "expert_model_parallel_size": 2},
    "tp 2 ep 2": {"tp": 2, "dp": 2, "expert_model_parallel_size": 2},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.05,  # logits that matter; more of it and fp32 alone is off by 1e-6
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,  # unlike the other, so that positions are scaled too
    "mscale_all_dim": 1.0,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe, scores as they are": (
        Qwen3MoeConfig,
        {"num_key_value_heads": 4, "head_dim": 12, "num_experts": 4, "norm_topk_prob": False},
    ),
    "deepseek_v3": (DeepseekV3Config, {**DEEPSEEK, "q_lora_rank": 24, "rope_parameters": YARN}),
    "deepseek_v3, queries without rank": (
        DeepseekV3Config,
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    ),
}


def written_by_transformers(folder: Path, name: str) -> Path:
    """Random weights of a family, of norms and of the bias of the choice of experts too."""
    torch.manual_seed(5)
    config, keys = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config(**COMMON, **keys))
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if "norm" in tensor_name:
                tensor.uniform_(0.5, 1.5)
            if tensor_name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_by_transformers(tmp_path_factory.mktemp("experts"), request.param)


@torch.no_grad()
def expected_logits(checkpoint: Path) -> dict[str, np.ndarray]:
    """[length, vocabulary] of each sequence by itself, in float64."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    model = model.double().eval()
    return {
        s.name: model(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0].numpy()
        for s in random_sequences(LENGTHS, VOCAB_SIZE)
    }


def loaded_and_written(actor: Actor, directory: Path) -> dict[str, np.ndarray]:
    """This rank's part of the vocabulary in the logits of its sequences; empty but on the last stage."""
    actor.write_hugging_face(directory)
    packs = actor.pack(random_sequences(LENGTHS, VOCAB_SIZE))

    def logits(
        pack: Any, weight: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        if actor.config.sequence_parallel:
            parts = [torch.empty_like(hidden) for _ in range(actor.grid.tp.size)]
            torch.distributed.all_gather(parts, hidden.contiguous(), group=actor.grid.tp.group)
            hidden = torch.cat(parts)
        found = (hidden[:, 0] @ weight.T).numpy()
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), found

    with torch.no_grad():
        found = actor.pipeline._run(packs, logits, forward_only=True)
    names = [s.name for pack in packs for s in pack.sequences] if found else []
    split = [part for pack, of_pack in zip(packs, found, strict=False) for part in _by_length(pack, of_pack)]
    return dict(zip(names, split, strict=True))


def _by_length(pack: Any, rows: np.ndarray) -> list[np.ndarray]:
    bounds = np.cumsum([len(s) for s in pack.sequences])
    return np.split(rows[: bounds[-1]], bounds[:-1]) if len(bounds) else []


def with_tensors(checkpoint: Path, folder: Path, tensors: dict[str, torch.Tensor], **change: Any) -> Path:
    """The checkpoint with other weights, and changes of its config.json."""
    folder.mkdir()
    values = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_transformers_and_what_was_loaded_is_written_bit_for_bit(
    checkpoint: Path, tmp_path: Path, layout: str
):
    ranks = on_actors(
        lambda actor: loaded_and_written(actor, tmp_path / "export"), checkpoint, **LAYOUTS[layout]
    )
    found = tensors_of(tmp_path / "export")
    assert_identical(found, tensors_of(checkpoint))
    expected = expected_logits(checkpoint)
    largest = max(np.abs(one).max() for one in expected.values())
    found_by_rank = {name: [rank[name] for rank in ranks if name in rank] for name in expected}
    distance = max(
        np.abs(np.concatenate(shards, axis=1)[:, :VOCAB_SIZE] - expected[name]).max()
        for name, shards in found_by_rank.items()
    )
    print(f"{distance / largest:.1e} of the largest logit, {largest:.1f}")
    assert distance < 1e-6 * largest


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 3}),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0}}),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.4}}),
        ("deepseek_v3", {"rope_parameters": YARN | {"factor": 4.5}}),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("deepseek_v3", {"routed_scaling_factor": 2.0}),
        ("deepseek_v3", {"topk_group": 2}),
        ("deepseek_v3", {}),
    ],
    ids=str,
)
def test_every_special_part_changes_the_logits(tmp_path: Path, family: str, change: dict[str, Any]):
    """What the comparison with transformers could not see would prove nothing there."""
    original = written_by_transformers(tmp_path / "original", family)
    tensors = tensors_of(original)
    if not change:
        tensors = {name: tensor * (not name.endswith("bias")) for name, tensor in tensors.items()}
    other = with_tensors(original, tmp_path / "other", tensors, **change)
    one, another = (
        on_actors(lambda actor: loaded_and_written(actor, tmp_path / "export"), model)[0]
        for model in (original, other)
    )
    differences = [np.abs(one[name] - another[name]).max() for name in one]
    assert max(differences) > 1e-4 * max(np.abs(logits).max() for logits in one.values())


def test_the_table_lists_what_transformers_writes(checkpoint: Path):
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(checkpoint).items()}
    assert table_of(read_model_shape(checkpoint)).tensors == found


@pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("layout", ["one rank", "ep 2"])
def test_an_actor_loads_what_was_written_without_one(checkpoint: Path, tmp_path: Path, layout: str):
    table = table_of(read_model_shape(checkpoint))
    write_megatron_checkpoint(
        SafetensorsSource(checkpoint, table),
        table,
        tmp_path / "megatron",
        template=checkpoint,
        ranks=Ranks(2, 2, 2),
        padded_vocab_size=VOCAB_SIZE + 1,
    )
    reader = MegatronReader(tmp_path / "megatron")
    assert_identical(dict(reader.hugging_face_tensors()), tensors_of(checkpoint))
    assert_identical(dict(reader.hugging_face_tensors(torch.bfloat16)), in_half(tensors_of(checkpoint)))

    def load(actor: Actor) -> None:
        load_weights(actor.model, tmp_path / "megatron")
        actor.write_hugging_face(tmp_path / "export")

    on_actors(load, checkpoint, initialization="random", **LAYOUTS[layout])
    assert_identical(tensors_of(tmp_path / "export"), tensors_of(checkpoint))


def in_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one if name.endswith("bias") else one.bfloat16() for name, one in tensors.items()}


def test_half_precision_keeps_the_bias_of_the_choice_in_full(checkpoint: Path, tmp_path: Path):
    half = in_half(tensors_of(checkpoint))
    model = with_tensors(checkpoint, tmp_path / "half", half)
    on_actors(lambda actor: actor.write_hugging_face(tmp_path / "export"), model, bf16=True)
    found = tensors_of(tmp_path / "export")
    assert_identical(found, half)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in half.items()
    }


def test_layers_that_predict_further_tokens_are_left_out_with_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table = table_of(read_model_shape(checkpoint))
    tensors = tensors_of(checkpoint)
    further = {
        "model.layers.4.enorm.weight": torch.ones(32),
        "model.layers.4.mlp.gate.weight": torch.ones(8, 32),
    }
    model = with_tensors(checkpoint, tmp_path / "further", tensors | further)
    if table.shape.model_type != "deepseek_v3":
        with pytest.raises(InputError, match=r"model\.layers\.4\.enorm\.weight"):
            SafetensorsSource(model, table)
        return
    source = SafetensorsSource(model, table)
    assert set(source) == set(tensors)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "model.layers.4.enorm.weight, model.layers.4.mlp.gate.weight are left out" in record.getMessage()


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"expert_model_parallel_size": 3}, r"must divide the model's \d experts"),
        ({"tensor_model_parallel_size": 3}, "must divide the model's 4 attention heads"),
        ({"tensor_model_parallel_size": 5}, "must divide the model's 24 "),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused(checkpoint: Path, sizes: dict[str, Any], says: str):
    with pytest.raises(InputError) as caught:
        transformer_config(ActorSection(**sizes), read_model_shape(checkpoint))
    assert any(re.search(says, problem) for problem in caught.value.problems)


def test_key_value_heads_are_not_shared_by_tensor_ranks(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        Qwen3MoeConfig(**COMMON, **CONFIGS["qwen3_moe"][1]).to_json_string()
    )
    with pytest.raises(InputError) as caught:
        transformer_config(ActorSection(tensor_model_parallel_size=4), read_model_shape(tmp_path))
    assert caught.value.problems == [
        "actor.tensor_model_parallel_size is 4, but must divide the model's 2 key-value heads: take a divisor."
    ]


def test_experts_are_spread_over_data_ranks_alone():
    section = ActorSection(tensor_model_parallel_size=2, expert_model_parallel_size=4)
    with pytest.raises(InputError, match="is 4, but must divide the 2 data-parallel ranks"):
        build_grid(section, rank=0, world_size=4, local_rank=0, init_method="", seed=1, timeout_s=1)


def test_training_them_is_refused_at_the_start(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.hf_path: .* experts can be converted but not trained yet"):
        load_config(write_run(tmp_path), [f"model.hf_path={checkpoint}"])
