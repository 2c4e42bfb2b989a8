"""A bare SentencePiece model is tokenized as sentencepiece and Llama 2 do it; all else is transformers' to read."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from megatron_a3po.errors import InputError
from megatron_a3po.rollout.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_a3po.rollout.tokenizer import load_tokenizer
from tests.rollout.tiny import tiny_tokenizer
from tests.rollout.tiny_sentencepiece import CHAT_TEMPLATE, trained, write_sentencepiece

BOS, EOS = 1, 2
IM_END, TOOL = 900, 901
ADDED = {
    str(IM_END): {"content": "<|im_end|>", "special": True},
    str(TOOL): {"content": "<tool>", "special": False, "lstrip": True},
}
TEXTS = ["The quick fox", "  leading, double  and trailing ", "3+4=7\n\n", "ü é 漢字 😀", "\t", " ", ""]
# What the special tokens are made of, so that many texts nearly hold one.
PIECES = st.lists(st.sampled_from([*"<s>/|unk", " ", "fox", "漢", "\n"]) | st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def reference() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=trained())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("model")
    return load_tokenizer(
        write_sentencepiece(folder, added_tokens_decoder=ADDED, chat_template=CHAT_TEMPLATE)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_sentencepiece_makes_of_it(tokenizer, reference, text: str):
    assert tokenizer.encode(text) == [BOS, *reference.encode(text)]
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text)) == f"<s>{text}"


@given(PIECES.map("".join))
def test_any_text_without_a_special_token(tokenizer, reference, text: str):
    if any(token in text for token in ("<s>", "</s>", "<unk>")):
        return
    tokens = tokenizer.encode(text)
    assert tokens == [BOS, *reference.encode(text)]
    # U+2581 is how sentencepiece writes a space.
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text.replace("\u2581", " ")


def test_special_tokens_in_a_text_are_recognised_and_begin_anew(tokenizer, reference):
    parts = ["[INST] hi [/INST] yo ", "[INST] x"]
    text = f"<s>{parts[0]}</s><s>{parts[1]}"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens == [BOS, *reference.encode(parts[0]), EOS, BOS, *reference.encode(parts[1])]
    assert tokens[1] == reference.piece_to_id("\u2581")  # the dummy prefix after a special token
    assert tokenizer.decode(tokens) == text


def test_added_tokens(tokenizer, reference):
    tokens = tokenizer.encode("a <tool>b<|im_end|>", add_special_tokens=False)
    assert tokens == [*reference.encode("a"), TOOL, *reference.encode("b"), IM_END]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a<tool>b"
    assert tokenizer.decode([*tokens, 5000]) == "a<tool>b<|im_end|>"  # an id of padded embeddings


def test_transformers_agrees_where_it_means_the_same(tokenizer, tmp_path: Path):
    """Its conversion, told to be Llama 2's, on text without leading spaces."""
    folder = write_sentencepiece(tmp_path, tokenizer_class="LlamaTokenizer", legacy=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    converted = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(converted, LlamaTokenizer)
    for text in ("The quick fox", "3+4=7\n\n", "ü é 漢字 😀", "<s>[INST] hi [/INST] yo </s><s>[INST] x"):
        expected = converted.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_a_chat_by_its_template(tokenizer, reference):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "x"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>[INST] hi [/INST] yo </s><s>[INST] x [/INST]"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens.count(BOS) == 2
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    ("settings", "first", "last", "eos"),
    [
        ({}, BOS, None, EOS),
        ({"add_bos_token": False}, None, None, EOS),
        ({"add_eos_token": True}, BOS, EOS, EOS),
        ({"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": ADDED}, BOS, None, IM_END),
        ({"bos_token": "</s>"}, EOS, None, EOS),
    ],
    ids=str,
)
def test_settings(tmp_path: Path, reference, settings: dict, first: int | None, last: int | None, eos: int):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, **settings))
    around = [[token] if token is not None else [] for token in (first, last)]
    assert tokenizer.encode("fox") == [*around[0], *reference.encode("fox"), *around[1]]
    assert tokenizer.eos_token_id == eos


def test_other_files_with_tokens(tmp_path: Path):
    folder = write_sentencepiece(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": IM_END}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_end|>"]})
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == IM_END
    assert tokenizer.decode([IM_END], skip_special_tokens=True) == ""
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "a<|im_end|>"


def test_a_tokenizer_json_goes_first(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    assert tokenizer.encode("12+34=") == tiny_tokenizer().encode("12+34=")


def test_no_sentencepiece_model(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken writes its files
    with pytest.raises(InputError, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path, model_type: str):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "vocab.json").write_text("{}")
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(InputError, match=r"cannot be loaded .*without code of its own") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in caught.value.problems[0]
    tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("12+34=") == tiny_tokenizer().encode("12+34=")
    assert not (tmp_path / "canary").exists()
