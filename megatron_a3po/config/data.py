"""The `data` section: the files with prompts and answers. What a line must hold is in `data_file.py`."""

from pydantic import Field

from megatron_a3po.config.section import Section


class DataSection(Section):
    """Prompts to train on and to be judged on."""

    train: str = Field(min_length=1)
    """JSONL file of training prompts: `prompt`, `question` or `messages`, and `answer`."""

    held_out: str | None = Field(default=None, min_length=1)
    """JSONL file of held-out prompts; accuracy is measured on these, and never without them."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    """A prompt with more tokens is dropped, counted and named once."""
