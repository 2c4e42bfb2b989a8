import json
import logging

import numpy as np
import pytest

from megatron_a3po.errors import InputError
from megatron_a3po.rollout.prompts import PromptStream, read_examples, tokenize
from megatron_a3po.rollout.tokenizer import load_tokenizer
from tests.rollout.tiny import tiny_tokenizer
from tests.rollout.tiny_sentencepiece import CHAT_TEMPLATE, write_sentencepiece

GOOD = {"prompt": "1+2=", "answer": "3"}


def write(folder, *rows) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(tmp_path, count: int):
    rows = [{"prompt": f"{number}=", "answer": number} for number in range(count)]
    return tokenize(read_examples(write(tmp_path, *rows)), tiny_tokenizer(), 8)


def test_prompt_question_and_messages_are_understood(tmp_path):
    chat = [{"role": "user", "content": "5+6="}]
    path = write(
        tmp_path,
        GOOD,
        "",
        {"question": "3+4=", "answer": "3 plus 4\n#### 7"},
        {"messages": chat, "answer": 11},
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}:{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    examples = read_examples(path)
    assert [example.answer for example in examples] == ["3", "7", "11"]
    assert [example.source.rsplit(":", 1)[1] for example in examples] == ["1", "3", "4"]
    prompts = tokenize(examples, tokenizer, 16)
    assert [prompt.text for prompt in prompts] == ["1+2=", "3+4=", ":5+6=="]
    assert tokenizer.decode(prompts[2].tokens.tolist()) == ":5+6=="
    assert prompts[0].tokens.dtype == np.int32


def test_a_chat_without_a_template_is_refused(tmp_path):
    path = write(tmp_path, {"messages": [{"role": "user", "content": "1"}], "answer": 1})
    with pytest.raises(
        InputError, match=r"data.jsonl:1 has messages, but the tokenizer has no chat template"
    ):
        tokenize(read_examples(path), tiny_tokenizer(), 16)


@pytest.mark.parametrize(
    "bad",
    ["{", "[1]", {"answer": 1}, {"prompt": 1, "answer": 1}, {"prompt": "1"}, {"messages": [], "answer": 1}],
)
def test_a_bad_line_is_named(tmp_path, bad):
    with pytest.raises(InputError, match=r"data.jsonl:2 "):
        read_examples(write(tmp_path, GOOD, bad, GOOD))


def test_a_warm_start_needs_responses(tmp_path):
    path = write(tmp_path, {**GOOD, "response": "3"}, GOOD)
    with pytest.raises(InputError, match=r"data.jsonl:2 has no response"):
        read_examples(path, with_response=True)
    assert read_examples(path)[0].response == "3"


def test_an_empty_file_or_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty"):
        read_examples(write(tmp_path))
    with pytest.raises(InputError, match="not there"):
        read_examples(tmp_path / "none.jsonl")


@pytest.mark.parametrize("kind", ["transformers", "sentencepiece"])
def test_a_chat_that_the_template_refuses_is_named(tmp_path, kind: str):
    chat = [{"role": "user", "content": "1"}, {"role": "critic", "content": "2"}]
    examples = read_examples(write(tmp_path, GOOD, {"messages": chat, "answer": 1}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = CHAT_TEMPLATE, "<eos>"
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "model", chat_template=CHAT_TEMPLATE))
    with pytest.raises(InputError, match=r"data.jsonl:2 has messages that .*\(no critic here\)"):
        tokenize(examples, tokenizer, 16)


def test_a_prompt_over_the_limit_is_left_out_counted_and_named_once(tmp_path, caplog):
    path = write(tmp_path, GOOD, {"prompt": "1" * 9, "answer": 1}, GOOD)
    with caplog.at_level(logging.WARNING):
        prompts = tokenize(read_examples(path), tiny_tokenizer(), 8)
    assert [prompt.index for prompt in prompts] == [0, 1]
    (record,) = caplog.records
    assert "1 of 3 prompts" in record.getMessage()
    assert "data.jsonl:2 (9 tokens)" in record.getMessage()
    with pytest.raises(InputError, match=r"all 3 prompts are over data.max_prompt_tokens=2"):
        tokenize(read_examples(path), tiny_tokenizer(), 2)


def test_the_stream_shuffles_every_epoch_by_seed_and_never_ends(tmp_path):
    prompts = numbered(tmp_path, 20)
    stream = PromptStream(prompts, seed=5)
    epochs = [[stream.at(epoch * 20 + i).text for i in range(20)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(prompt.text for prompt in prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [stream.at(i).index for i in (0, 19, 20, 41)] == [0, 19, 20, 41]
    # Any position can be asked for in any order: the stream has no state.
    assert [PromptStream(prompts, seed=5).at(i).text for i in range(40, 60)] == epochs[2]
    assert [PromptStream(prompts, seed=6).at(i).text for i in range(20)] != epochs[0]
