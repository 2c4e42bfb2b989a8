"""`evaluate` on a tiny checkpoint: the number is right, nothing is written, what is missing is said."""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_a3po.__main__ import main
from tests.rollout.tiny import EOS_ID, tiny_model, tiny_tokenizer
from tests.rollout.tiny_sentencepiece import CHAT_TEMPLATE, trained, write_sentencepiece
from tests.run_files import write_rows

RESPONSE_TOKENS = 6
PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(3)]


def greedy(model: torch.nn.Module, tokenizer, prompt: str) -> str:
    """Transformers alone, one forward over the whole prefix for each token."""
    tokens = tokenizer.encode(prompt)
    length = len(tokens)
    with torch.no_grad():
        while len(tokens) < length + RESPONSE_TOKENS and tokens[-1] != EOS_ID:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[length:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose held-out answers are the model's own for every second prompt."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = tiny_model(3), tiny_tokenizer()
    model.save_pretrained(folder / "export")
    tokenizer.save_pretrained(folder / "export")
    responses = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    numbers = [re.findall(r"\d+", response)[-1] for response in responses]
    answers = [number if place % 2 else "123456789" for place, number in enumerate(numbers)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers)]
    write_rows(folder / "held_out.jsonl", rows)
    config = {
        "run_dir": "moved/since",
        "model": {"hf_path": "gone/too"},
        "data": {"train": "gone.jsonl", "held_out": str(folder / "held_out.jsonl")},
        "reward": {"type": "exact_number"},
        "rollout": {"max_response_tokens": RESPONSE_TOKENS},
        "trainer": {"steps": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_is_scored_by_its_export(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    before = files_of(run_dir)
    assert main(["evaluate", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"accuracy 0.500 on {len(PROMPTS)} held-out prompts (6 right), ")
    assert said.endswith(f", greedy, {run_dir / 'export'}\n")
    assert files_of(run_dir) == before


def test_another_checkpoint(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other"
    tiny_model(4).save_pretrained(other)
    arguments = ["evaluate", str(run_dir), "--checkpoint", str(other), f"model.hf_path={run_dir}/export"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "accuracy 0.000" in said
    assert said.endswith(f"{other}\n")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["data.held_out=null"], ["data.held_out is missing"]),
        (["reward=null"], ["reward is missing"]),
        (
            ["data.held_out=gone.jsonl", "--checkpoint", "gone"],
            ["gone.jsonl is not there", "gone is not a folder"],
        ),
        (["rollout.tempurature=1"], ["rollout.temperature"]),
    ],
)
def test_refused(
    run_dir: Path, arguments: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", str(run_dir), *arguments]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said


def test_a_damaged_tokenizer(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other"
    tiny_model(4).save_pretrained(other)
    (other / "tokenizer.json").write_text("{")
    assert main(["evaluate", str(run_dir), "--checkpoint", str(other)]) == 2
    assert f"{other}/tokenizer.json is not readable as JSON" in capsys.readouterr().err


def test_a_checkpoint_with_a_bare_sentencepiece_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Texts and chats, against transformers' model and sentencepiece alone; one of three answers is wrong."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained())
    vocab_size = pieces.vocab_size() + 6  # padded, as checkpoints often are
    model = tiny_model(5, vocab_size=vocab_size)
    model.save_pretrained(tmp_path / "model")
    write_sentencepiece(tmp_path / "model", chat_template=CHAT_TEMPLATE)

    def response(text: str) -> str:
        tokens = [pieces.bos_id(), *pieces.encode(text)]
        length = len(tokens)
        with torch.no_grad():
            for _ in range(RESPONSE_TOKENS):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                if tokens[-1] == EOS_ID:
                    break
        special = (pieces.bos_id(), pieces.eos_id(), pieces.unk_id())
        kept = [token for token in tokens[length:] if token < pieces.vocab_size() and token not in special]
        return pieces.decode(kept).strip()

    rows = [
        {"prompt": "The quick  fox", "answer": response("The quick  fox")},
        {"messages": [{"role": "user", "content": "hi"}], "answer": response("[INST] hi [/INST]")},
        {"prompt": "How many?", "answer": "another"},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = {
        "model": {"hf_path": str(tmp_path / "model")},
        "data": {"train": "gone.jsonl", "held_out": str(tmp_path / "rows.jsonl")},
        "reward": {"type": "function", "path": "tests.trainer.rewards:same_text"},
        "rollout": {"max_response_tokens": RESPONSE_TOKENS},
        "trainer": {"steps": 1},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["evaluate", str(tmp_path), "--checkpoint", str(tmp_path / "model")]) == 0
    assert "accuracy 0.667 on 3 held-out prompts (2 right)" in capsys.readouterr().out


def test_a_run_that_has_not_ended(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "--checkpoint" in capsys.readouterr().err
