"""What a line of a data file must hold, in one place: the checks at start and the loader both ask here.

A row has a prompt, as `prompt`, `question` (both text) or `messages` (a chat), and an `answer`; a warm start
needs a `response` too, and the reward `exact_number` an answer with a number. No tokenizer here: a prompt that
is too long is found when it is tokenized.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_a3po.config.problem import shown
from megatron_a3po.errors import InputError

PROMPT_KEYS = ("prompt", "question", "messages")
ANSWER_MARK = "####"  # GSM8K's, between how one gets to the answer and the answer


def rows(
    path: str | Path, *, with_response: bool = False, with_number: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for each line that is not blank; InputError names file and line of the first bad one."""
    file = Path(path)
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _row(f"{file}:{number}", line, with_response, with_number)
    except FileNotFoundError:
        raise InputError(f"{file} is not there: give the path of a JSONL file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable as text: {error}.") from None


def check_rows(
    path: str | Path, *, with_response: bool = False, with_number: bool = False, with_chats: bool = True
) -> None:
    """InputError if a row of a data file is bad or there is none; without `with_chats`, a chat is bad too."""
    is_empty = True
    for number, row in rows(path, with_response=with_response, with_number=with_number):
        is_empty = False
        if prompt_key(row) == "messages" and not with_chats:
            raise InputError(
                f"{path}:{number} has messages, but the tokenizer has no chat template to write them with: bring its "
                "chat_template.jinja, or give the text in `prompt`."
            )
    if is_empty:
        raise InputError(f"{path} is empty: give a JSONL file with one example on each line.")


def prompt_key(row: dict[str, Any]) -> str:
    """Which of PROMPT_KEYS holds the row's prompt."""
    return next(key for key in PROMPT_KEYS if key in row)


def final_answer(row: dict[str, Any]) -> str:
    """The answer that a response is held against."""
    return str(row["answer"]).split(ANSWER_MARK)[-1].strip()


def _row(where: str, line: str, with_response: bool, with_number: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not readable as JSON: {error}.") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is {shown(row)}, but must be a JSON object with a prompt and an answer.")
    prompts = [key for key in PROMPT_KEYS if key in row]
    if not prompts:
        raise InputError(f"{where} has no prompt: it must hold one of {', '.join(PROMPT_KEYS)}.")
    key = prompts[0]
    if key == "messages":
        if not _is_chat(row[key]):
            raise InputError(
                f"{where} has messages that are no chat: each must be an object with the texts role and "
                "content."
            )
    elif not isinstance(row[key], str):
        raise InputError(f"{where} has {key}={shown(row[key])}, but it must be text.")
    if not isinstance(row.get("answer"), str | int | float):
        raise InputError(f"{where} has no answer: it must hold `answer`, a text or a number.")
    if with_number and not re.search(r"\d", final_answer(row)):
        raise InputError(
            f"{where} has the answer {shown(final_answer(row))} without a number, which "
            "reward.type=exact_number needs: mend the row, or use another reward.type."
        )
    if with_response and not isinstance(row.get("response"), str):
        raise InputError(f"{where} has no response: a warm start learns from the text in `response`.")
    return row


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )
