"""1 if math-verify finds the response's expression equal to the answer, else 0.

math-verify is maintained by Hugging Face; its own time limits are switched off, because `scorer.py` has one.
"""

from math_verify import parse, verify

NO_LIMIT = 0


def math_equal(prompt: str, response: str, answer: str) -> float:
    wanted = parse(answer, parsing_timeout=NO_LIMIT) or parse(f"${answer}$", parsing_timeout=NO_LIMIT)
    if not wanted:
        raise ValueError(f"the answer {answer!r} is no expression that math-verify can read")
    return float(verify(wanted, parse(response, parsing_timeout=NO_LIMIT), timeout_seconds=NO_LIMIT))
