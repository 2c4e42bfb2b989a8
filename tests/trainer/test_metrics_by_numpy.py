"""`metrics` mode against plain numpy: every number of a row, recomputed from the dumped batch.

Log-probs come from `transformers` in float64: g from the weights the step began with, t of mini-batch 2 from those the
first update left, which a run on the first half of the batch exports.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_a3po.trainer.batch import Batch, batch_path, load_batch, save_batch
from tests.trainer.numpy_metrics import step_metrics
from tests.trainer.replay import NUM_GROUPS, Replays

MADE_ELSEWHERE = {"step", "version", "attempt", "grad_norm", "forwards_per_token", "steps_skipped"}
TOLERANCE = 1e-6  # of max(|value|, 1), for sums and means
ONE_TOKEN = 1e-5  # for a min or max: the trainer's log-probs are fp32


@torch.no_grad()
def logp_and_entropy(weights: Path, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of every response token, trajectory by trajectory."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64).eval()
    logps, entropies = [], []
    ends = np.cumsum(batch["lengths"])
    for end, length, prompt in zip(ends, batch["lengths"], batch["prompt_lengths"]):
        tokens = batch["tokens"][end - length : end].astype(np.int64)
        logits = model(torch.from_numpy(tokens)[None]).logits[0].double().numpy()[prompt - 1 : -1]
        logits = logits - logits.max(1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        logps.append(logp[np.arange(len(logp)), tokens[prompt:]])
        entropies.append(-(np.exp(logp) * logp).sum(1))
    return np.concatenate(logps), np.concatenate(entropies)


def weights_after_mini_batch_1(replays: Replays) -> Path:
    """The export of a step on the first half of the batch."""
    whole = load_batch(batch_path(replays.folder / "batches", 1))
    half = replays.folder / "first-half"
    save_batch(batch_path(half, 1), Batch(whole.groups[: NUM_GROUPS // 2], whole.version))
    replays.run("numpy-half", f"trainer.prompts_per_step={NUM_GROUPS // 2}", f"trainer.replay={half}")
    return replays.folder / "numpy-half" / "export"


@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_every_number_of_a_row(replays: Replays, num_mini_batches: int) -> None:
    name = f"numpy-{num_mini_batches}"
    (row,), _ = replays.run(
        name,
        "actor.prox_logp_method=metrics",
        f"actor.num_mini_batches={num_mini_batches}",
        "trainer.dump_batches=true",
    )
    with np.load(replays.folder / name / "batches" / "step-000001.npz") as file:
        batch = dict(file)
    g, entropy = logp_and_entropy(replays.folder / "model", batch)
    t = g
    if num_mini_batches == 2:
        second = np.concatenate(
            [
                np.full(n, i >= len(batch["lengths"]) // 2)
                for i, n in enumerate(batch["lengths"] - batch["prompt_lengths"])
            ]
        )
        later = logp_and_entropy(weights_after_mini_batch_1(replays), batch)
        t, entropy = np.where(second, later[0], g), np.where(second, later[1], entropy)
        assert np.abs(t - g)[second].mean() > 0.01  # else the columns would not tell t from g
    expected = step_metrics(batch, t, g, entropy, num_mini_batches)
    reported = {
        key: value
        for key, value in row.items()
        if key not in MADE_ELSEWHERE
        and not key.startswith(("time/", "rollout/", "memory/"))
        and key != "staleness/histogram"
    }
    assert reported.keys() == expected.keys()
    wrong = {
        key: (reported[key], value)
        for key, value in expected.items()
        if abs(reported[key] - value)
        > (ONE_TOKEN if key.endswith(("/min", "/max")) else TOLERANCE) * max(abs(value), 1.0)
    }
    assert not wrong
