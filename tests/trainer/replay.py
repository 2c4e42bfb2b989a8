"""Replays: a tiny Qwen2 on disk, batches as `trainer.dump_batches` keeps them, and the runs that train on them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch, batch_path, save_batch
from megatron_a3po.trainer.recording import read_metrics
from tests.rollout.tiny import CHARACTERS, EOS_ID, tiny_model, tiny_tokenizer
from tests.run_files import ROWS, write_rows
from tests.trainer import command
from tests.trainer.command import Ended

NUM_GROUPS, SAMPLES, MAX_RESPONSE = 8, 4, 16
FIRST_VERSION = 5  # of the batches' own; a replay takes it from them
Rows = list[dict[str, Any]]
Weights = dict[str, torch.Tensor]


def write_tiny_model(folder: Path, seed: int = 5) -> torch.nn.Module:
    model = tiny_model(seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_batches(folder: Path, model: Any, steps: int, seed: int = 11) -> None:
    """Unequal lengths, stalenesses 0 to 3, and behaviours far enough from the target for the clip to decide."""
    for step in range(1, steps + 1):
        save_batch(batch_path(folder, step), make_batch(model, step, np.random.default_rng([seed, step])))


def make_batch(model: Any, step: int, rng: np.random.Generator) -> Batch:
    groups, version = [], FIRST_VERSION + step - 1
    for index in range((step - 1) * NUM_GROUPS, step * NUM_GROUPS):
        prompt = rng.integers(2, 2 + len(CHARACTERS), rng.integers(3, 8))
        trajectories = tuple(
            _trajectory(model, index, sample, prompt, version, rng) for sample in range(SAMPLES)
        )
        groups.append(Group(index, f"prompt {index}", "1", trajectories))
    return Batch(groups, version)


def _trajectory(
    model: Any, index: int, sample: int, prompt: np.ndarray, version: int, rng: np.random.Generator
) -> Trajectory:
    length = int(rng.integers(2, MAX_RESPONSE + 1))
    response = rng.integers(2, 2 + len(CHARACTERS), length)
    response[-1] = EOS_ID
    tokens = np.concatenate([prompt, response])
    generated = np.sort(rng.integers(version - 3, version + 1, length))
    logp = response_logp(model, tokens, len(prompt)) + rng.normal(0.0, 0.25, length)
    return Trajectory(
        prompt_index=index,
        sample=sample,
        tokens=tokens.astype(np.int32),
        prompt_length=len(prompt),
        versions=np.concatenate([np.full(len(prompt), -1), generated]).astype(np.int32),
        behave_logp=np.concatenate([np.zeros(len(prompt)), logp]).astype(np.float32),
        finish_reason="stop",
        reward=float(rng.random()) if sample else 1.0,
    )


@torch.no_grad()
def response_logp(model: Any, tokens: np.ndarray, prompt_length: int) -> np.ndarray:
    """Log-probs of the response tokens, in float64."""
    logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logp[np.arange(prompt_length - 1, len(tokens) - 1), tokens[prompt_length:]]


class Replays:
    """A folder with a model and batches; each `run` is the production command on them."""

    def __init__(self, folder: Path, steps: int = 4) -> None:
        self.folder = folder
        self.model = write_tiny_model(folder / "model")
        write_batches(folder / "batches", self.model, steps)
        write_rows(folder / "train.jsonl", ROWS)
        self.config = folder / "replay.yaml"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "model": {"hf_path": str(folder / "model")},
                    "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 16},
                    "actor": {"lr": 1e-3, "max_tokens_per_micro_batch": 256},
                    "rollout": {
                        "samples_per_prompt": SAMPLES,
                        "max_response_tokens": MAX_RESPONSE,
                        "max_staleness": 3,
                    },
                    "trainer": {
                        "steps": 1,
                        "prompts_per_step": NUM_GROUPS,
                        "replay": str(folder / "batches"),
                    },
                }
            )
        )

    def argv(self, name: str, *overrides: str) -> list[str]:
        return ["train", str(self.config), f"run_dir={self.folder / name}", *overrides]

    def ended(self, name: str, *overrides: str) -> Ended:
        return command.run(self.folder / "out" / name, *self.argv(name, *overrides))

    def run(self, name: str, *overrides: str) -> tuple[Rows, Weights]:
        """The rows and the exported weights of a run that must succeed."""
        ended = self.ended(name, *overrides)
        assert ended.code == 0, ended.output + logs_of(self.folder / name)
        return self.rows(name), self.weights(name)

    def rows(self, name: str) -> Rows:
        return read_metrics(self.folder / name)

    def weights(self, name: str) -> Weights:
        return exported(self.folder / name)


def exported(run_dir: Path) -> Weights:
    tensors: Weights = {}
    for file in sorted((run_dir / "export").glob("*.safetensors")):
        tensors |= load_file(file)
    assert tensors
    return tensors


def logs_of(run_dir: Path) -> str:
    return "\n".join(f"--- {file}\n{file.read_text()}" for file in sorted(run_dir.glob("logs/*")))


def identical(one: Weights, other: Weights) -> bool:
    """The same bits under the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_times(rows: Rows) -> Rows:
    """What must repeat from run to run: everything but seconds, memory and the number of the start."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time/", "memory/")) and name != "attempt"
        }
        for row in rows
    ]
