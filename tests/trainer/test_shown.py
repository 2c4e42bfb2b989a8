"""samples.jsonl: which trajectories it has, the text of each token, and what the update made of each token."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a3po.trainer.batch import batch_path, load_batch
from megatron_a3po.trainer.recording import Recorder
from megatron_a3po.trainer.shown import Shown, token_texts
from tests.trainer.replay import Replays, Rows, response_logp
from tests.trainer.runs import batch_of

EPS = 0.2
EVERY_TOKEN = ("tokens", "texts", "versions", "behave_logp", "logp", "importance_weight", "clipped")


class Letters:
    """A tokenizer of one letter a token; 1 is the EOS."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        letters = [chr(ord("a") + token) if token != 1 else "#" for token in token_ids]
        return "".join(letter for letter in letters if letter != "#" or not skip_special_tokens)


class Bytes:
    """One byte a token, as the rarer characters of a byte-level vocabulary are."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


class Words:
    """Writes a space between words, so that a word alone has none."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{token}" for token in token_ids)


def samples_of(run_dir: Path) -> Rows:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_whole_trajectories_of_different_prompts(tmp_path: Path):
    recorder = Recorder(tmp_path, attempt=1)
    shown = Shown.of(batch_of(8), 8, 4)
    shown.figures["prompt 2, sample 0"] = {
        "logp": [-0.5, -1.0, -0.25],
        "importance_weight": [1.0, 1.5, 1.0],
        "clipped": [False, True, False],
    }
    recorder.samples(8, 7, shown, Letters())
    recorder.close()
    rows = samples_of(tmp_path)
    assert [row["prompt"] for row in rows] == ["prompt 0", "prompt 2", "prompt 4", "prompt 6"]
    assert rows[1] == {
        "step": 8,
        "current_version": 7,
        "prompt": "prompt 2",
        "response": "kl",
        "tokens": [2, 10, 11, 1],
        "texts": ["c", "k", "l", "#"],
        "versions": [-1, 6, 6, 7],
        "behave_logp": [0.0, -0.5, None, -0.25],
        "logp": [None, -0.5, -1.0, -0.25],
        "importance_weight": [None, 1.0, 1.5, 1.0],
        "clipped": [None, False, True, False],
        "reward": 1.0,
        "finish_reason": "stop",
    }
    assert rows[0]["clipped"] == [None] * 4  # no update had it


@pytest.mark.parametrize(("num_groups", "step", "number"), [(1, 1, 1), (3, 4, 3), (5, 8, 4), (5, 9, 0)])
def test_how_many(num_groups: int, step: int, number: int):
    shown = Shown.of(batch_of(num_groups), step, 4)
    assert len({group.prompt for group in shown.groups}) == len(shown.groups) == number


def test_the_text_of_a_token():
    text = "né 日本#"
    assert "".join(token_texts(Bytes(), list(text.encode()))) == text
    assert token_texts(Bytes(), list("é!".encode())) == ["", "é", "!"]
    assert token_texts(Bytes(), list("aé".encode())[:-1]) == [
        "a",
        "\ufffd",
    ]  # cut in the middle of a character
    assert token_texts(Words(), [1, 2, 3]) == ["w1", " w2", " w3"]


def expected_row(replays: Replays, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """Log-prob, ratio and clip of a sample's response in mini-batch 1, from `transformers` and the dumped batch."""
    batch = load_batch(batch_path(replays.folder / "batches", sample["step"]))
    group = next(group for group in batch.groups if group.prompt == sample["prompt"])
    trajectory = group.trajectories[0]
    response = slice(trajectory.prompt_length, None)
    logp = response_logp(replays.model, trajectory.tokens, trajectory.prompt_length)
    stale = np.maximum(batch.version - trajectory.versions[response], 1)
    ratio = np.exp((logp - trajectory.behave_logp[response]) / stale)  # loglinear, in closed form
    rewards = np.array([one.reward for one in group.trajectories], dtype=np.float64)
    advantage = rewards[0] - rewards.mean()
    clipped = np.clip(ratio, 1 - EPS, 1 + EPS) * advantage < ratio * advantage
    return {"logp": logp, "importance_weight": ratio, "clipped": clipped}


def test_what_the_update_made_of_each_token(replays: Replays):
    settings = ["actor.prox_logp_method=loglinear", "actor.max_tokens_per_micro_batch=64"]
    replays.run("shown", *settings)
    rows = samples_of(replays.folder / "shown")
    assert len(rows) == 4
    for row in rows:
        length = len(row["tokens"])
        assert {name: len(row[name]) for name in EVERY_TOKEN} == dict.fromkeys(EVERY_TOKEN, length)
        expected = expected_row(replays, row)
        prompt_length = length - len(expected["logp"])
        for name, values in expected.items():
            assert row[name][:prompt_length] == [None] * prompt_length
            assert np.allclose(row[name][prompt_length:], values, atol=1e-5), (name, row["prompt"])
    assert any(token for row in rows for token in row["clipped"])

    # The last pipeline stage of another data rank has them: they come to rank 0 all the same.
    replays.run(
        "shown-spread", *settings, "actor.pipeline_model_parallel_size=2", "actor.data_parallel_size=2"
    )
    for row, spread in zip(rows, samples_of(replays.folder / "shown-spread"), strict=True):
        assert spread["clipped"] == row["clipped"]
        assert spread["texts"] == row["texts"]
        trained = [place for place, value in enumerate(row["logp"]) if value is not None]
        for name in ("logp", "importance_weight"):
            assert np.allclose(
                *(np.array(one[name])[trained].astype(float) for one in (row, spread)), atol=1e-5
            )
