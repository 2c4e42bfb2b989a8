"""What a tokenizer's files tell before anything is loaded: does it fit the model, can it write a chat."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.config.tokenizer_files import TOKENIZER_FILES, has_chat_template, tokenizer_problems
from tests.rollout.tiny import CHARACTERS, tiny_tokenizer
from tests.rollout.tiny_sentencepiece import trained, write_sentencepiece

BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}}}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5], ["c", -2.0]]}}


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def added(*ids: int, content: str = "<x>") -> list[dict[str, Any]]:
    return [{"id": number, "content": content} for number in ids]


@pytest.mark.parametrize(
    ("files", "num_tokens"),
    [
        ({"tokenizer": BPE}, 3),
        ({"tokenizer": UNIGRAM}, 3),
        ({"tokenizer": {**BPE, "added_tokens": added(7)}}, 8),
        ({"tokenizer": BPE, "added_tokens": {"<x>": 5}}, 6),
        ({"tokenizer": BPE, "tokenizer_config": {"added_tokens_decoder": {"6": added(6)[0]}}}, 7),
        ({"vocab": {"a": 0, "b": 4}}, 5),
    ],
    ids=str,
)
def test_more_tokens_than_embeddings_are_refused_with_both_numbers(
    tmp_path: Path, files: dict[str, Any], num_tokens: int
):
    write(tmp_path, **files)
    assert list(tokenizer_problems(tmp_path, num_tokens)) == []
    assert list(tokenizer_problems(tmp_path, num_tokens + 100)) == []  # padded embeddings
    (problem,) = tokenizer_problems(tmp_path, num_tokens - 1)
    assert f"has {num_tokens} tokens, but config.json has vocab_size={num_tokens - 1}" in problem


def test_of_a_sentencepiece_model(tmp_path: Path):
    num_pieces = 330
    write_sentencepiece(tmp_path)
    assert list(tokenizer_problems(tmp_path, num_pieces)) == []
    (problem,) = tokenizer_problems(tmp_path, num_pieces - 1)
    assert f"has {num_pieces} tokens" in problem
    (tmp_path / "tokenizer.model").write_bytes(trained()[:-9])
    (problem,) = tokenizer_problems(tmp_path, num_pieces)
    assert "tokenizer.model is no SentencePiece model" in problem


def test_transformers_own_files(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert list(tokenizer_problems(tmp_path, len(CHARACTERS) + 2)) == []
    (problem,) = tokenizer_problems(tmp_path, len(CHARACTERS) + 1)
    assert '" "' in problem or '"Ġ"' in problem


def test_gemmas_image_token_is_nothing_to_a_text_model(tmp_path: Path):
    image = added(3, content="<image_soft_token>")
    write(
        tmp_path,
        tokenizer={**BPE, "added_tokens": image},
        tokenizer_config={"added_tokens_decoder": {"3": image[0]}},
    )
    assert list(tokenizer_problems(tmp_path, 3)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": {**BPE, "added_tokens": [1]}},
        {"tokenizer": {"model": []}},
        {"added_tokens": {"<x>": "y"}},
    ],
    ids=str,
)
def test_files_of_another_making(tmp_path: Path, files: dict[str, Any]):
    write(tmp_path, **{"tokenizer": BPE, **files})
    found = list(tokenizer_problems(tmp_path, 3))
    assert all("tokenizer files unlike those" in problem for problem in found)
    assert len(found) == (files != {"tokenizer": {"model": []}})


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({}, False),
        ({"chat_template": ""}, False),
        ({"chat_template": "{{ messages }}"}, True),
        ({"chat_template": [{"name": "tool_use", "template": "{{ messages }}"}]}, False),
        ({"chat_template": [{"name": "default", "template": "{{ messages }}"}]}, True),
    ],
    ids=str,
)
def test_chat_templates(tmp_path: Path, settings: dict[str, Any], has: bool):
    write(tmp_path, tokenizer=BPE, tokenizer_config=settings)
    assert has_chat_template(tmp_path) == has
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)


def test_what_transformers_writes_is_part_of_a_tokenizer(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= set(TOKENIZER_FILES)
