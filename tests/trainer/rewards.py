"""Reward functions as a user writes them, named by import path in the tests' configurations."""

import time


def any_response(prompt: str, response: str, answer: str) -> float:
    """Differs from response to response, so that every group has something to learn from."""
    return sum(map(ord, response)) % 101 / 100


def constant(prompt: str, response: str, answer: str) -> float:
    """So that every group is filtered."""
    return 0.0


def broken(prompt: str, response: str, answer: str) -> float:
    raise LookupError(f"no reward for {prompt}")


def slow(prompt: str, response: str, answer: str) -> float:
    time.sleep(1.0)
    return any_response(prompt, response, answer)


def unhurried(prompt: str, response: str, answer: str) -> float:
    """So that a step of 16 responses takes 0.4 s at least, on any machine."""
    time.sleep(0.05)
    return any_response(prompt, response, answer)


def same_text(prompt: str, response: str, answer: str) -> float:
    return float(response.strip() == answer)
