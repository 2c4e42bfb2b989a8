"""Run directories of any length, with every metric a run may have."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_a3po.algorithm.metric_table import TABLE

CONFIG = """\
model: {hf_path: models/tiny}
actor: {prox_logp_method: metrics, num_mini_batches: 4, use_decoupled_loss: true, bf16: false}
rollout: {max_staleness: 8, samples_per_prompt: 8}
trainer: {steps: 10000, prompts_per_step: 32}
"""


def write_run(run_dir: Path, steps: int, *, num_samples: int = 4, **changes: Any) -> Path:
    """An unfinished run: `steps` rows, each with every metric, and some samples."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    rng = np.random.default_rng(steps)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({**row_of(step, rng), **changes}) + "\n")
    with (run_dir / "samples.jsonl").open("w") as file:
        for step in range(1, steps + 1, max(steps // 1000, 1)):
            for _ in range(num_samples):
                file.write(json.dumps(sample_of(step, rng)) + "\n")
    return run_dir


def row_of(step: int, rng: np.random.Generator) -> dict[str, Any]:
    noise = rng.normal(0, 0.05, len(TABLE)).tolist()
    row: dict[str, Any] = {"step": step, "version": step - 1, "attempt": 1}
    row |= {
        metric.name: 1 - math.exp(-step / 50) + n for metric, n in zip(TABLE, noise) if "<" not in metric.name
    }
    row["staleness/histogram"] = {str(age): int(rng.integers(1, 1000)) for age in range(9)}
    row["staleness/max"] = 8.0
    row |= {name: 2**30 * (1 + abs(row[name])) for name in row if name.startswith("memory/")}
    parts = (
        "forward_backward",
        "wait_for_samples",
        "proximal_pass",
        "optimizer",
        "publish",
        "metrics",
        "align",
    )
    row |= {f"time/{part}": abs(n) for part, n in zip(parts, noise)}
    row["time/step"] = sum(row[f"time/{part}"] for part in parts) + 0.1
    return row | {"evaluation/version": step // 10 * 10}


def sample_of(step: int, rng: np.random.Generator, length: int = 200) -> dict[str, Any]:
    old = max(step - 3, 0)
    weights = np.exp(rng.normal(0, 0.2, length)).tolist()
    return {
        "step": step,
        "current_version": step - 1,
        "prompt": "47+85=",
        "response": "word " * length,
        "tokens": [7, *[5] * length],
        "texts": ["47+85=", *["word "] * length],
        "versions": [-1, *[old] * (length // 2), *[step - 1] * (length - length // 2)],
        "behave_logp": [0.0, *[-0.5] * length],
        "logp": [None, *[-0.4] * length],
        "importance_weight": [None, *weights],
        "clipped": [None, *(weight > 1.2 for weight in weights)],
        "reward": 1.0,
        "finish_reason": "stop",
    }
