"""A tokenizer that is a bare SentencePiece model, with Llama 2's conventions around it.

Text becomes what sentencepiece itself makes of it, dummy prefix included, after a token that begins a sequence
(unless tokenizer_config.json has `add_bos_token: false`). Special and added tokens are recognised where a text has
them, as in what a chat template writes, and the text after one is encoded like any other, dummy prefix included:
so does Llama 2's own code. transformers 5 converts such a model instead, and differs in prefix, leading spaces and
beginning. The methods are those of its tokenizers that are called here; which of the two a folder gets is decided
in `tokenizer.py`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_a3po.config.tokenizer_files import (
    SETTINGS_FILE,
    added_tokens,
    chat_template,
    read_contents,
    read_sentencepiece,
)

NAMES = ("bos", "eos", "unk", "pad")


class SentencePieceTokenizer:
    """The tokenizer of a folder with a `tokenizer.model`. Errors: InputError where a file of it is damaged."""

    def __init__(self, folder: Path) -> None:
        contents = read_contents(folder)
        settings = contents.get("special_tokens_map.json", {}) | contents.get(SETTINGS_FILE, {})
        self.chat_template = chat_template(folder)
        self._model = read_sentencepiece(folder)
        self._num_pieces = self._model.vocab_size()
        self._begins, self._ends = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
        added = added_tokens(contents)
        self._written = {number: token["content"] for number, token in added.items()}
        # The model's own, unless the settings name others: `bos_token` and so on, as chat templates call them.
        self.special_tokens = {
            f"{name}_token": self._model.id_to_piece(number)
            for name in NAMES
            if (number := getattr(self._model, f"{name}_id")()) >= 0
        } | dict(_named(settings))
        for token in self.special_tokens.values():
            number = self._model.piece_to_id(token)
            if self._model.id_to_piece(number) == token:  # anything unknown has the id of <unk>
                self._written.setdefault(number, token)
        self._ids = {token: number for number, token in self._written.items()}
        self._special = {
            self._ids.get(token) for token in (*self.special_tokens.values(), *_unnamed(settings))
        }
        self._special |= {number for number, token in added.items() if token.get("special")}
        self._pattern = _pattern(self._ids, {token["content"]: token for token in added.values()})

    @property
    def bos_token_id(self) -> int | None:
        return self._ids.get(self.special_tokens.get("bos_token", ""))

    @property
    def eos_token_id(self) -> int | None:
        return self._ids.get(self.special_tokens.get("eos_token", ""))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        begin = [self.bos_token_id] if add_special_tokens and self._begins else []
        end = [self.eos_token_id] if add_special_tokens and self._ends else []
        return [token for token in (*begin, *self._tokens(text), *end) if token is not None]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids without a token (a model's embeddings may be padded) are passed over, as transformers does."""
        kept = [token for token in token_ids if not (skip_special_tokens and token in self._special)]
        known = [token for token in kept if token in self._written or token < self._num_pieces]
        return "".join(
            "".join(self._written[token] for token in run) if is_written else self._model.decode(list(run))
            for is_written, run in groupby(known, self._written.__contains__)
        )

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The chat as text, by transformers' own sandboxed renderer."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert self.chat_template is not None, "a chat needs a template: see config/file_checks.py"
        assert not tokenize, (
            "what is rendered is encoded without special tokens, which the template has written"
        )
        options: dict[str, Any] = {
            "chat_template": self.chat_template,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
        }
        (text,), _ = render_jinja_template([conversation], **options)
        return text

    def _tokens(self, text: str) -> Iterator[int]:
        end = 0
        for match in self._pattern.finditer(text):
            yield from self._model.encode(text[end : match.start()])
            yield self._ids[match[match.lastindex or 0]]
            end = match.end()
        yield from self._model.encode(text[end:])


def _pattern(ids: dict[str, int], described: dict[str, dict[str, Any]]) -> re.Pattern[str]:
    """Matches one of the tokens, the longest first, with the white space that it takes along."""

    def alternative(token: str) -> str:
        before, after = (
            r"\s*" if described.get(token, {}).get(side) else "" for side in ("lstrip", "rstrip")
        )
        return f"{before}({re.escape(token)}){after}"

    return re.compile("|".join(map(alternative, sorted(ids, key=len, reverse=True))))


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in NAMES:
        if (token := settings.get(f"{name}_token")) is not None:
            yield f"{name}_token", _content(token)


def _unnamed(settings: dict[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):  # before transformers 5, and since
        tokens = settings.get(key) or ()
        yield from map(_content, tokens.values() if isinstance(tokens, dict) else tokens)


def _content(token: str | dict[str, Any]) -> str:
    """A token is written as it is or described."""
    return token if isinstance(token, str) else token["content"]
