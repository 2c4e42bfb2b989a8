"""A tiny Qwen2 on disk, batches to replay through it, and a replayed run's numbers.

Batches and weights are functions of a seed, by numpy alone, so that they are the same on every machine. Behaviour
log-probs are the model's own plus noise that grows with staleness: ratios move far enough for the clip to decide.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_a3po.rollout.trajectory import Group, Trajectory
from megatron_a3po.trainer.batch import Batch, batch_path, save_batch
from megatron_a3po.trainer.recording import read_metrics
from tests.trainer.command import fork
from tests.trainer.replay import exported, logs_of

VOCAB_SIZE = 151  # odd and prime: padded under TP 2, and no other dimension of the model
HIDDEN_SIZE = 64
EOS_ID = 1
CHARACTERS = "0123456789+=;: " + "".join(chr(0x3041 + i) for i in range(VOCAB_SIZE - 17))

FIRST_VERSION = 5
NUM_GROUPS, GROUP_SIZE = 8, 3


@dataclass(frozen=True)
class Outcome:
    """What a replayed run leaves behind."""

    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    run_dir: Path

    def column(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows])


def write_model(folder: Path, *, tied: bool = False, num_layers: int = 4, seed: int = 0) -> Path:
    """A Hugging Face directory: config, character tokenizer, float32 weights that bfloat16 holds exactly."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
            parameter.copy_(_weight(name, noise).bfloat16())
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def _weight(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Large enough that logits differ (their standard deviation is 1.6), small enough that layers, which amplify each
    other's rounding, leave it at 5e-7 of the largest logit."""
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    return (0.08 if "layers" in name else 0.2) * noise


def read_model(folder: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True).eval()


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_batches(folder: Path, model: Path, num_steps: int, *, seed: int = 1) -> list[Batch]:
    """Batches of steps 1..num_steps in `folder`, the first one beginning with version FIRST_VERSION."""
    policy = read_model(model)
    batches = []
    for step in range(1, num_steps + 1):
        rng = np.random.default_rng([seed, step])
        batch = random_batch(policy, rng, version=FIRST_VERSION + step - 1)
        save_batch(batch_path(folder, step), batch)
        batches.append(batch)
    return batches


def random_batch(policy: Qwen2ForCausalLM, rng: np.random.Generator, *, version: int) -> Batch:
    groups = []
    for prompt_index in range(NUM_GROUPS):
        prompt = rng.integers(2, VOCAB_SIZE, rng.integers(2, 8)).astype(np.int32)
        samples = tuple(
            _random_trajectory(policy, rng, prompt, prompt_index, sample, version)
            for sample in range(GROUP_SIZE)
        )
        groups.append(Group(prompt_index, f"prompt {prompt_index}", "1", samples))
    return Batch(groups, version)


def _random_trajectory(
    policy: Qwen2ForCausalLM,
    rng: np.random.Generator,
    prompt: np.ndarray,
    prompt_index: int,
    sample: int,
    version: int,
) -> Trajectory:
    """1 to 24 tokens under 1 to 3 versions; the reward prefers low token ids, so that there is something to learn."""
    length = int(rng.integers(1, 25))
    response = rng.integers(2, VOCAB_SIZE, length).astype(np.int32)
    response[-1] = EOS_ID
    ages = np.sort(rng.integers(0, 6, min(length, int(rng.integers(1, 4)))))[::-1]
    versions = version - np.sort(rng.choice(ages, length))[::-1].astype(np.int32)
    tokens = np.concatenate([prompt, response])
    scored = policy_logp(policy, tokens)[len(prompt) - 1 :]
    noise = rng.normal(0, 0.1 + 0.1 * (version - versions))
    return Trajectory(
        prompt_index=prompt_index,
        sample=sample,
        tokens=tokens,
        prompt_length=len(prompt),
        versions=np.concatenate([np.full(len(prompt), -1, np.int32), versions]),
        behave_logp=np.concatenate([np.zeros(len(prompt)), scored + noise]).astype(np.float32),
        finish_reason="stop",
        reward=float(np.mean(response < VOCAB_SIZE // 2)),
    )


@torch.no_grad()
def policy_logp(policy: Qwen2ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """log pi(token t + 1 | tokens up to t), by transformers; one fewer than there are tokens."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = policy(ids[None]).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()


def write_config(folder: Path, model: Path, batches: Path, num_steps: int) -> Path:
    """The configuration of a replay; layouts and methods come as overrides.

    Adam divides a gradient by its own size. With its usual epsilon of 1e-8 the few elements whose gradient is nearly
    zero turn rounding noise (1e-9 here) into steps of a tenth of the learning rate; 1e-5 is above the noise and far
    below a typical gradient (3e-3), so that layouts can be compared and weights still move by the learning rate.
    """
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(10, 50)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "replay.yaml"
    file.write_text(
        f"""
model: {{hf_path: {model}}}
data: {{train: {folder}/train.jsonl, max_prompt_tokens: 16}}
actor: {{prox_logp_method: loglinear, num_mini_batches: 2, max_tokens_per_micro_batch: 96, lr: 1e-3, adam_eps: 1e-5}}
rollout: {{samples_per_prompt: {GROUP_SIZE}, max_response_tokens: 24, max_staleness: 5}}
trainer: {{steps: {num_steps}, prompts_per_step: {NUM_GROUPS}, replay: {batches}}}
distributed: {{timeout_s: 60}}
"""
    )
    return file


def replay(config: Path, name: str, *overrides: str, before: Callable[[], None] | None = None) -> Outcome:
    """Run `train` on `config` into a directory of this name beside it."""
    run_dir = config.parent / name
    argv = ("train", str(config), f"run_dir={run_dir}", *overrides)
    ended = fork(config.parent / "output" / name, *argv, before=before).wait()
    assert ended.code == 0, ended.output + logs_of(run_dir)
    return Outcome(read_metrics(run_dir), exported(run_dir), run_dir)


def layout(tp: int = 1, pp: int = 1, dp: int = 1, *, vpp: int | None = None, sp: bool = False) -> list[str]:
    """Overrides for a process grid."""
    keys = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "data_parallel_size": dp}
    if vpp:
        keys["virtual_pipeline_model_parallel_size"] = vpp
    return [f"actor.{key}={value}" for key, value in keys.items()] + [
        f"actor.sequence_parallel={str(sp).lower()}"
    ]
