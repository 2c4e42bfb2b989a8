"""1 if math-verify finds the response's expression equal to the answer, else 0.

math-verify is maintained by Hugging Face; its own time limits are switched off, because `scorer.py` has one.
"""

from math_verify import parse, verify


def math_equal(prompt: str, response: str, answer: str) -> float:
    wanted = parse(answer, parsing_timeout=None) or parse(f"${answer}$", parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the answer {answer!r} is no expression that math-verify can read")
    return float(verify(wanted, parse(response, parsing_timeout=None), timeout_seconds=None))
