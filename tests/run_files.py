"""The smallest set of files a configuration can name: a Qwen2 config.json, JSONL data and the YAML itself."""

import json
from pathlib import Path
from typing import Any

MODEL = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "response": str(2 * i)} for i in range(4)]


def write_model(folder: Path, **changes: Any) -> Path:
    """A model folder without weights; a change to None takes the key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**MODEL, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_rows(file: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_run(folder: Path) -> Path:
    """A configuration that can be run, with all it names; the path of its YAML file."""
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "held_out.jsonl", ROWS)
    file = folder / "tiny.yaml"
    file.write_text(
        f"""
model:
  hf_path: {folder}/model
  initialization: random
data:
  train: {folder}/train.jsonl
  max_prompt_tokens: 16
reward:
  type: exact_number
rollout:
  max_response_tokens: 32
trainer:
  steps: 10
  prompts_per_step: 8
"""
    )
    return file
