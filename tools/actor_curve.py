"""Losses of a few steps of a small actor on one rank: `actor_curve.py fp32|bf16 TRANSFORMER_IMPL FILE`.

Weights and batches come from a seed, so two machines, precisions or attention kernels can be compared step by step.
"""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from synthetic import BatchShape, qwen2_shape, synthetic_batch

    from megatron_a3po.actor.actor import Actor
    from megatron_a3po.actor.grid import build_grid, leave_grid
    from megatron_a3po.actor.optimizer import Schedule
    from megatron_a3po.config.actor import ActorSection
    from megatron_a3po.config.model import ModelSection
    from megatron_a3po.config.rollout import RolloutSection
    from megatron_a3po.trainer.batch import align, supervised_sequence
    from megatron_a3po.trainer.clock import Clock
    from megatron_a3po.trainer.method import Method
    from megatron_a3po.trainer.step import train_step
    from megatron_a3po.vocab_parallel.policy_objective import supervised_objective

BATCH = BatchShape(prompts=8, samples=4, prompt_tokens=16, response_tokens=64)
SIZES: dict[str, Any] = {"hidden_size": 256, "num_layers": 4, "ffn_hidden_size": 512, "vocab_size": 509}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_query_groups": 2, "max_position_embeddings": 128}
RL_STEPS, SUPERVISED_STEPS = 5, 10


def main() -> int:
    dtype, transformer_impl, output = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    section = ActorSection.model_validate(
        {
            "bf16": dtype == "bf16",
            "transformer_impl": transformer_impl,
            "num_mini_batches": 2,
            "prox_logp_method": "loglinear",
            "max_tokens_per_micro_batch": 1024,
        }
    )
    with tempfile.TemporaryDirectory(prefix="actor-curve-") as folder:
        place = {"rank": 0, "world_size": 1, "local_rank": 0, "init_method": f"file://{folder}/rendezvous"}
        grid = build_grid(section, **place, seed=1, timeout_s=60)
        model = ModelSection(hf_path="random", initialization="random")
        actor = Actor(section, model, qwen2_shape(**SIZES, **HEADS), grid, temperature=1.0, seed=1)
        Path(output).write_text(json.dumps(_rl(actor, section) | _supervised(actor)))
        leave_grid()
    return 0


def _rl(actor: Actor, section: ActorSection) -> dict[str, Any]:
    actor.start_stage(Schedule(1e-4, 0.0, 0, "constant", 1000))
    method, rollout, losses, sizes = Method.of(section), RolloutSection(), [], []
    for step in range(RL_STEPS):
        batch = synthetic_batch(BATCH, SIZES["vocab_size"], seed=step)
        mini_batches = align(batch, section, rollout)
        trained = [abs(s.advantages[s.loss_mask]).mean() for mini_batch in mini_batches for s in mini_batch]
        sizes.append(float(sum(trained) / len(trained)))
        losses.append(train_step(actor, mini_batches, method, Clock())["loss"])
    return {"rl": losses, "mean_abs_advantage": sum(sizes) / len(sizes)}


def _supervised(actor: Actor) -> dict[str, Any]:
    """One batch again and again: a loss of one sign, on which a wrong gradient shows at once."""
    actor.start_stage(Schedule(1e-3, 0.0, 0, "constant", 1000))
    trajectories = synthetic_batch(BATCH, SIZES["vocab_size"], seed=100).trajectories
    packs = actor.pack(
        [
            supervised_sequence(t.name, t.tokens[: t.prompt_length], t.tokens[t.prompt_length :])
            for t in trajectories
        ]
    )
    losses, seconds = [], 0.0
    for step in range(SUPERVISED_STEPS):
        start = time.monotonic()
        update = actor.update(packs, supervised_objective)
        losses.append(update.loss_sum.item() / update.denominator)
        seconds += time.monotonic() - start if step else 0.0
    return {"supervised": losses, "seconds_per_step": seconds / (SUPERVISED_STEPS - 1)}


if __name__ == "__main__":
    sys.exit(main())
