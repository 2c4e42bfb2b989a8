"""Run directories as the trainer leaves them, and batches by hand."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch
from megatron_a3po.trainer.recording import Recorder


def metrics_of(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "reward/avg": step / 10,
        "loss": 1e-3,
        "staleness/avg": 0.5,
        "staleness/max": 2.0,
        "staleness/histogram": {"0": 12, "1": 30},
        "tokens/trained": 100.0,
        "forwards_per_token": 1.0,
        "time/step": 2.0,
        "time/forward_backward": 1.0,
        "time/wait_for_samples": 0.5,
        **changes,
    }


def record_steps(run_dir: Path, steps: range, *, attempt: int = 1, **changes: Any) -> None:
    recorder = Recorder(run_dir, attempt=attempt)
    for step in steps:
        recorder.record(step, step - 1, metrics_of(step, **changes))
    recorder.close()


def batch_of(num_groups: int, *, version: int = 7) -> Batch:
    """Two samples a group; token ids say which group, which sample."""
    groups = [
        Group(
            index,
            f"prompt {index}",
            "1",
            tuple(
                Trajectory(
                    prompt_index=index,
                    sample=sample,
                    tokens=np.array([index, 10 + sample, 11, 1], np.int32),
                    prompt_length=1,
                    versions=np.array([-1, 6, 6, 7], np.int32),
                    behave_logp=np.array([0.0, -0.5, -np.inf, -0.25], np.float32),
                    finish_reason="stop",
                    reward=1.0,
                )
                for sample in range(2)
            ),
        )
        for index in range(num_groups)
    ]
    return Batch(groups, version)
