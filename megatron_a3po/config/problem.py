"""One thing that is wrong with a configuration: the keys it is about, and the sentence the user reads."""

import json
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """`keys` are dotted. A problem about a key that is itself unreadable would be noise, and is not told."""

    keys: tuple[str, ...]
    sentence: str


def shown(value: Any, limit: int = 60) -> str:
    """A value as the user may have written it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
