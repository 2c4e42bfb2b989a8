"""The one place where a tokenizer is loaded, for rollouts, warm start and records alike.

A folder with a `tokenizer.json` (or the vocabulary it is made from) is transformers' to read; one with nothing but
a SentencePiece `tokenizer.model` is read by `sentencepiece_tokenizer.py`. No code of a folder is ever run. Whether
the files are whole and fit the model is looked at before, in `config/tokenizer_files.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_a3po.config.tokenizer_files import SENTENCEPIECE_FILE, read_settings
from megatron_a3po.errors import InputError
from megatron_a3po.rollout.sentencepiece_tokenizer import SentencePieceTokenizer


class Tokenizer(Protocol):
    """What is asked of a tokenizer; the names are transformers'."""

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


def load_tokenizer(folder: str | Path) -> Any:
    """The Tokenizer of a Hugging Face folder. Errors: InputError names the folder."""
    folder = Path(folder)
    is_serialized = (folder / "tokenizer.json").is_file()
    if (folder / SENTENCEPIECE_FILE).is_file() and not is_serialized:
        return SentencePieceTokenizer(folder)
    has_own_code = "auto_map" in read_settings(folder)
    # A tokenizer.json says everything by itself, whatever class its folder would like to bring.
    reader = PreTrainedTokenizerFast if is_serialized and has_own_code else AutoTokenizer
    try:
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side of transformers' tokenizers raises bare Exceptions
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the tokenizer in {folder} cannot be loaded ({reason}): bring one that transformers loads without code of "
            "its own, as a tokenizer.json."
        ) from None
