"""Prompts: JSONL examples, tokenized once, and the endless stream that training draws from.

A row's prompt is `prompt`, `question` or `messages` (through the tokenizer's chat template); its `answer` may be
GSM8K's, whose final answer follows `####`; `response` is what a supervised warm start learns. What a row must hold is
checked in `config/data_file.py`. No torch here.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from megatron_a3po.config.data_file import final_answer, prompt_key, rows
from megatron_a3po.errors import InputError

logger = logging.getLogger(__name__)

NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Example:
    """One row of a data file. `prompt` is text or a chat, `answer` the final answer, `source` is file:line."""

    prompt: str | tuple[dict[str, str], ...]
    answer: str
    response: str | None = None
    source: str = ""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenized example at a position of the stream (or, held out, of the file)."""

    index: int
    text: str
    answer: str
    tokens: npt.NDArray[np.int32]
    response: str | None = None


def read_examples(path: str | Path, *, with_response: bool = False) -> list[Example]:
    """All rows of a data file; InputError names file and line of the first bad one."""
    examples = []
    for number, row in rows(path, with_response=with_response):
        prompt = row[prompt_key(row)]
        examples.append(
            Example(
                prompt if isinstance(prompt, str) else tuple(prompt),
                final_answer(row),
                row.get("response"),
                f"{path}:{number}",
            )
        )
    if not examples:
        raise InputError(f"{path} is empty: give a JSONL file with one example on each line.")
    return examples


def tokenize(examples: Sequence[Example], tokenizer: Any, max_prompt_tokens: int) -> list[Prompt]:
    """The examples that fit, in their order, with their positions in it. Those that do not are named once."""
    prompts: list[Prompt] = []
    dropped: list[str] = []
    for example in examples:
        text, tokens = _text_and_tokens(example, tokenizer)
        if not tokens:
            raise InputError(f"{example.source} has a prompt without a single token: give it some text.")
        if len(tokens) > max_prompt_tokens:
            dropped.append(f"{example.source} ({len(tokens)} tokens)")
            continue
        prompts.append(
            Prompt(len(prompts), text, example.answer, np.array(tokens, dtype=np.int32), example.response)
        )
    if dropped:
        names = ", ".join(dropped[:NAMED_AT_MOST]) + (", ..." if len(dropped) > NAMED_AT_MOST else "")
        limit = f"data.max_prompt_tokens={max_prompt_tokens}"
        logger.warning(
            "%d of %d prompts are over %s and left out: %s", len(dropped), len(examples), limit, names
        )
        if not prompts:
            raise InputError(
                f"all {len(dropped)} prompts are over {limit}: raise it. The first: {dropped[0]}."
            )
    return prompts


class PromptStream:
    """The endless stream of training prompts: position i is in epoch i // len(prompts), shuffled by seed and epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def at(self, index: int) -> Prompt:
        epoch, position = divmod(index, len(self._prompts))
        chosen = self._prompts[self._order(epoch)[position]]
        return Prompt(index, chosen.text, chosen.answer, chosen.tokens, chosen.response)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            # In-flight prompts of the epoch before may be asked for again; older ones are not.
            self._orders.pop(epoch - 2, None)
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._orders[epoch] = generator.permutation(len(self._prompts))
        return self._orders[epoch]


def _text_and_tokens(example: Example, tokenizer: Any) -> tuple[str, list[int]]:
    if isinstance(example.prompt, str):
        return example.prompt, list(tokenizer.encode(example.prompt))
    if tokenizer.chat_template is None:
        raise InputError(
            f"{example.source} has messages, but the tokenizer has no chat template: use `prompt`."
        )
    try:
        text = tokenizer.apply_chat_template(list(example.prompt), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:  # some templates refuse a role, or two in a row
        raise InputError(
            f"{example.source} has messages that the tokenizer's chat template does not take ({error}): mend the row."
        ) from None
    # The template has written the special tokens already.
    return text, list(tokenizer.encode(text, add_special_tokens=False))
