"""A folder's tokenizer as its files tell of it: which there are, which ids, how a chat is written.

Nothing is tokenized here: json and, for a bare `tokenizer.model`, sentencepiece, no transformers. The tokenizer
itself comes from `rollout/tokenizer.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_a3po.config.json_file import read_json_object
from megatron_a3po.config.problem import shown
from megatron_a3po.errors import InputError

# Any of these makes a tokenizer, and the first there is is what is used.
SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, "vocab.json")
SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# All that belongs to a tokenizer, and goes along with an exported checkpoint.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    SETTINGS_FILE,
    CHAT_TEMPLATE_FILE,
)
# Gemma 3's text models share the tokenizer of those that see, whose image token has an id past their embeddings.
IMAGE_TOKENS = ("<image_soft_token>",)

ANEW = "copy the tokenizer's files there anew"

Contents = dict[str, dict[str, Any]]  # by file name


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in `folder`."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def tokenizer_problems(folder: Path, vocab_size: int) -> Iterator[str]:
    """One sentence for each thing wrong with the tokenizer of a model with `vocab_size` ids."""
    if not has_tokenizer(folder):
        yield f"{folder} has no tokenizer ({', '.join(VOCABULARY_FILES)}): copy the tokenizer's files there."
        return
    try:
        ids = _ids(folder, read_contents(folder))
        beyond = {number: token for number, token in ids if number >= vocab_size}
    except InputError as error:
        yield from error.problems
        return
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"{folder} has tokenizer files unlike those transformers writes ({error!r}): copy them there anew."
        return
    if beyond:
        yield (
            f"the tokenizer in {folder} has {max(beyond) + 1} tokens, but config.json has vocab_size={vocab_size} and "
            f"so no embedding for {shown(beyond[min(beyond)])} and what follows it: take the tokenizer that belongs "
            "to the model, or resize the model's embeddings."
        )


def read_contents(folder: Path) -> Contents:
    """The tokenizer's files that are JSON, by name; InputError has a sentence for each that is none."""
    contents: Contents = {}
    problems = []
    for name in TOKENIZER_FILES:
        try:
            if name.endswith(".json") and (folder / name).is_file():
                contents[name] = read_json_object(folder / name, ANEW)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return contents


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none; InputError if it is damaged."""
    file = folder / SETTINGS_FILE
    return read_json_object(file, ANEW) if file.is_file() else {}


def read_sentencepiece(folder: Path) -> Any:
    """The SentencePieceProcessor of `tokenizer.model`; InputError if that is no such model."""
    import sentencepiece

    file = folder / SENTENCEPIECE_FILE
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{file} is no SentencePiece model ({reason}): copy it there anew, or bring a tokenizer.json."
        ) from None


def added_tokens(contents: Contents) -> dict[int, dict[str, Any]]:
    """Tokens besides the vocabulary's own, by id, as transformers describes them (`content`, `special`, ...)."""
    found = {number: {"content": token} for token, number in contents.get("added_tokens.json", {}).items()}
    described = contents.get(SETTINGS_FILE, {}).get("added_tokens_decoder") or {}
    return found | {int(number): token for number, token in described.items()}


def chat_template(folder: Path) -> str | None:
    """The Jinja template that writes a chat as text; None where there is none."""
    file = folder / CHAT_TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_settings(folder).get("chat_template")
    if isinstance(template, list):  # several by name, of which the one called so is meant
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template or None


def has_chat_template(folder: Path) -> bool:
    """Whether a chat can be written. A tokenizer that is missing or damaged is named by `tokenizer_problems`."""
    try:
        return not has_tokenizer(folder) or chat_template(folder) is not None
    except (InputError, AttributeError, KeyError, TypeError, ValueError):
        return True


def _ids(folder: Path, contents: Contents) -> Iterator[tuple[int, str]]:
    """Every id that may come out of the tokenizer, with its token."""
    if "tokenizer.json" in contents:
        tokenizer = contents["tokenizer.json"]
        yield from _numbered((tokenizer.get("model") or {}).get("vocab") or {})
        added = tokenizer.get("added_tokens") or []
        yield from (
            (token["id"], token["content"]) for token in added if token["content"] not in IMAGE_TOKENS
        )
    elif (folder / SENTENCEPIECE_FILE).is_file():
        model = read_sentencepiece(folder)
        yield from ((number, model.id_to_piece(number)) for number in range(model.vocab_size()))
    else:
        yield from _numbered(contents["vocab.json"])
    for number, token in added_tokens(contents).items():
        if token["content"] not in IMAGE_TOKENS:
            yield number, token["content"]


def _numbered(vocabulary: Any) -> Iterator[tuple[int, str]]:
    """(id, token) of a vocabulary as byte-pair encodings write it (a mapping) or unigrams (a list with scores)."""
    if isinstance(vocabulary, dict):
        yield from ((number, token) for token, number in vocabulary.items())
    else:
        yield from ((number, entry[0]) for number, entry in enumerate(vocabulary))
