"""The full-size example: its data, its dry run at full size, and two steps of it shrunken to a tiny random model."""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_a3po.__main__ import main
from megatron_a3po.rollout.rewards.math import math_equal
from megatron_a3po.trainer.recording import read_metrics
from tests.trainer import command
from tests.trainer.replay import logs_of

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/gsm8k/config.yaml"
PROBLEMS = [
    (
        "Ann has 3 boxes of 12 eggs. She uses 7. How many are left?",
        "3 boxes hold 3*12=<<3*12=36>>36.\n36-7=29\n#### 29",
    ),
    ("A shop sells 45 cakes a day at $50 each. What does it take?", "45*50=<<45*50=2250>>2250\n#### 2,250"),
    ("Tom had 5 euros and owes 8. What has he?", "5-8=-3\n#### -3"),
    ("Half of 9 litres is how much?", "9/2=4.5\n#### 4.5"),
]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
EOS = "<eos>"
# Of Qwen/Qwen2.5-1.5B-Instruct.
SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write_tokenizer(folder: Path) -> int:
    """One token a byte, and a chat template; its size."""
    vocabulary = {
        token: index for index, token in enumerate([EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GSM8K's files in its own format, made into chats by examples/gsm8k/prepare.py."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in PROBLEMS]
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(rows))
    prepare().main(folder, folder / "inputs")
    return folder / "inputs"


def prepare() -> Any:
    """examples/gsm8k/prepare.py, which is a script in no package."""
    spec = importlib.util.spec_from_file_location("prepare_gsm8k", ROOT / "examples/gsm8k/prepare.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def overrides(inputs: Path, model: Path, *more: str) -> list[str]:
    return [
        f"model.hf_path={model}",
        f"data.train={inputs}/train.jsonl",
        f"data.held_out={inputs}/held_out.jsonl",
        *more,
    ]


def test_answers_are_what_the_reward_looks_for(inputs: Path) -> None:
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["29", "2250", "-3", "4.5"]
    for row, (question, _) in zip(rows, PROBLEMS):
        (message,) = row["messages"]
        assert message["role"] == "user"
        assert message["content"].startswith(question)
        assert "\\boxed{}" in message["content"]
        assert math_equal("", f"So it is \\boxed{{{row['answer']}}}.", row["answer"]) == 1.0
        assert math_equal("", "So it is \\boxed{12345}.", row["answer"]) == 0.0
    assert math_equal("", "It takes \\boxed{\\$2,250}.", rows[1]["answer"]) == 1.0


def test_a_folder_without_the_problems_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train\.jsonl and .*test\.jsonl not found"):
        prepare().main(tmp_path / "nowhere", tmp_path / "inputs")
    assert not (tmp_path / "inputs").exists()


def test_dry_run_at_full_size(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, servers = tmp_path / "model", tmp_path / "servers"
    Qwen2Config(**SHAPE, eos_token_id=0, dtype="bfloat16").save_pretrained(model)
    write_tokenizer(model)
    servers.mkdir()
    (servers / "token").write_text("secret")
    where = [f"rollout.servers_file={servers}", f"rollout.token_file={servers}/token"]
    argv = [
        "train",
        str(CONFIG),
        "--dry-run",
        *overrides(inputs, model, *where, "model.initialization=random"),
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "4 ranks = data 4" in said
    assert "run_dir: runs/gsm8k" in said
    for published in (
        "256 prompts x 4",
        "in 4 mini-batches",
        "1024 of them trained",
        "at most 8, policy wait",
        "A-3PO's",
    ):
        assert published in said, said


def test_two_steps_of_it_shrunken(inputs: Path, tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    vocab_size = write_tokenizer(model)
    shape: dict[str, Any] = SHAPE | TINY | {"vocab_size": vocab_size, "max_position_embeddings": 512}
    Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=0, dtype="float32")).save_pretrained(model)
    ended = command.run(
        tmp_path / "out",
        "train",
        str(CONFIG),
        *overrides(inputs, model, f"run_dir={run_dir}"),
        *("rollout.engine=local", "rollout.servers_file=null", "rollout.token_file=null"),
        *("data.max_prompt_tokens=200", "rollout.max_response_tokens=12", "actor.data_parallel_size=1"),
        *("trainer.steps=2", "trainer.prompts_per_step=4", "trainer.evaluate_every=1", "actor.bf16=false"),
        "actor.entropy_coef=0.01",  # no answer of random weights is right
    )
    assert ended.code == 0, ended.output + logs_of(run_dir)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["forwards_per_token"] == 1.0 and row["grad_norm"] > 0 for row in rows)
    assert all(row["rollout/filtered_groups"] == 0 for row in rows)
    (shown, *_) = (json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines())
    assert shown["prompt"].startswith("user: ")
    assert shown["prompt"].endswith("assistant: ")
    AutoModelForCausalLM.from_pretrained(run_dir / "export")


def test_the_script_of_the_servers_starts_none_without_a_gpu_to_name(tmp_path: Path) -> None:
    ended = subprocess.run(
        [ROOT / "examples/gsm8k/servers.sh"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert "vLLM is missing" in ended.stderr
