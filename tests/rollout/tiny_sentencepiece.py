"""A SentencePiece model of Llama 2's making (byte fallback, no normalisation, split digits), trained on a few lines."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "Janet has 3 apples and 4 pears: 3+4=7.",
    "How many fruits does she have?",
]
# Llama 2's, for a chat that begins with the user.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no ' + message.role + ' here') }}{% endif %}{% endfor %}"
)


@functools.cache
def trained() -> bytes:
    """The content of a `tokenizer.model`."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def write_sentencepiece(folder: Path, **settings: Any) -> Path:
    """A folder with a `tokenizer.model` and, if there are any, settings in tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
