"""The families with experts: transformers' logits and, bit for bit, its tensors, with experts spread over ranks too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from megatron_a3po.actor.actor import Actor
from megatron_a3po.config import load_config, read_model_shape
from megatron_a3po.errors import ConfigError
from megatron_a3po.weights.families import table_of
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


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a family, as transformers writes them."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(5)
    config, keys = CONFIGS[request.param]
    model = AutoModelForCausalLM.from_config(config(**COMMON, **keys))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    return folder


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


def test_the_table_lists_what_transformers_writes(checkpoint: Path):
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(checkpoint).items()}
    assert table_of(read_model_shape(checkpoint)).tensors == found


def test_training_them_is_refused_at_the_start(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.hf_path: .* experts can be converted but not trained yet"):
        load_config(write_run(tmp_path), [f"model.hf_path={checkpoint}"])
