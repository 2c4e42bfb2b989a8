"""Models and batches drawn from a seed, for measuring: like real ones in shape, of no meaning.

Weights are random, rewards are coins, behaviour log-probs lie around those of an untrained model. Used by
`benchmark_step.py` and `gpu_check.py`; no test or run trains on these.
"""

from dataclasses import dataclass

import numpy as np

from megatron_a3po.algorithm.staleness import NOT_GENERATED
from megatron_a3po.config import ModelShape
from megatron_a3po.config.model_shape import Rope
from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch

OLDEST_STALENESS = 4


@dataclass(frozen=True)
class BatchShape:
    """How much a step trains on. Lengths are upper bounds: prompts are half of theirs or longer, responses a
    quarter."""

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int


def qwen2_shape(
    *,
    hidden_size: int,
    num_layers: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    vocab_size: int,
    max_position_embeddings: int,
    tie_word_embeddings: bool = True,
) -> ModelShape:
    """A Qwen2 of this size."""
    return ModelShape(
        model_type="qwen2",
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        head_dim=hidden_size // num_attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rope=Rope(),
        norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=tie_word_embeddings,
        add_qkv_bias=True,
        eos_token_ids=(1,),
    )


def synthetic_batch(shape: BatchShape, vocab_size: int, seed: int) -> Batch:
    """Groups whose responses have several versions, up to OLDEST_STALENESS behind the batch's."""
    rng = np.random.default_rng(seed)
    version = OLDEST_STALENESS
    groups = []
    for index in range(shape.prompts):
        prompt = rng.integers(
            0, vocab_size, rng.integers(shape.prompt_tokens // 2, shape.prompt_tokens, endpoint=True)
        )
        rewards = rng.permutation(np.arange(shape.samples) % 2)
        trajectories = tuple(
            _trajectory(rng, index, sample, prompt, float(reward), shape, vocab_size, version)
            for sample, reward in enumerate(rewards)
        )
        groups.append(Group(index, "", "", trajectories))
    return Batch(groups, version)


def _trajectory(
    rng: np.random.Generator,
    index: int,
    sample: int,
    prompt: np.ndarray,
    reward: float,
    shape: BatchShape,
    vocab_size: int,
    version: int,
) -> Trajectory:
    length = int(rng.integers(max(1, shape.response_tokens // 4), shape.response_tokens, endpoint=True))
    versions = np.sort(rng.integers(version - OLDEST_STALENESS, version, length, endpoint=True))
    behave_logp = np.minimum(rng.normal(-np.log(vocab_size), 0.1, length), -1e-3)
    return Trajectory(
        prompt_index=index,
        sample=sample,
        tokens=np.concatenate([prompt, rng.integers(0, vocab_size, length)]).astype(np.int32),
        prompt_length=len(prompt),
        versions=np.concatenate([np.full(len(prompt), NOT_GENERATED), versions]).astype(np.int32),
        behave_logp=np.concatenate([np.zeros(len(prompt)), behave_logp]).astype(np.float32),
        finish_reason="stop",
        reward=reward,
    )
