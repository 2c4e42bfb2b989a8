"""1 if the last number of the response equals the answer, else 0."""

import re
from decimal import Decimal

# A minus belongs to the number unless it stands between two operands; thousands may be set off by commas.
NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def exact_number(prompt: str, response: str, answer: str) -> float:
    """Compared as decimals, so that 18 is 18.0 and 1,234 is 1234."""
    wanted = last_number(answer)
    if wanted is None:
        raise ValueError(f"the answer {answer!r} has no number; use another reward.type for such data")
    return float(last_number(response) == wanted)


def last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
