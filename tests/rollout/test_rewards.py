import asyncio
import os
import signal
import time
from decimal import Decimal
from pathlib import Path

import pytest

from megatron_a3po.config.reward import ExactNumberReward, FunctionReward, MathReward
from megatron_a3po.errors import RewardError
from megatron_a3po.rollout.rewards.exact_number import exact_number, last_number
from megatron_a3po.rollout.rewards.math import math_equal
from megatron_a3po.rollout.rewards.scorer import Scorer

HERE = "tests.rollout.test_rewards"


def length_reward(prompt: str, response: str, answer: str) -> float:
    print("a reward may print")
    return len(response) / len(answer)


def bad_reward(prompt: str, response: str, answer: str) -> float:
    if response == "good":
        return 1.0
    raise ZeroDivisionError("the reward's own words")


def slow_reward(prompt: str, response: str, answer: str) -> float:
    if response == "slow":
        time.sleep(600)
    if response == "crash":
        os._exit(9)
    return 1.0


def killed_once_reward(prompt: str, response: str, answer: str) -> float:
    """As a process killed from outside: the next one does not die."""
    try:
        Path(answer).touch(exist_ok=False)
    except FileExistsError:
        return 1.0
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def text_reward(prompt: str, response: str, answer: str) -> str:
    return "excellent"


def function(name: str, **settings) -> Scorer:
    return Scorer(FunctionReward(type="function", path=f"{HERE}:{name}", **settings))


def scores(scorer: Scorer, *responses: str, answer: str = "12") -> list[float | None]:
    """One after the other, so that what is in a row is in a row."""

    async def run() -> list[float | None]:
        try:
            await scorer.start()
            return [await scorer.score("p", response, answer) for response in responses]
        finally:
            await scorer.close()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def importable_in_workers(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config):
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7+5+0=12;4+8+1=13 :132", "132"),
        ("it is -3.", "-3"),
        ("10-7", "7"),
        ("$1,234.50 in all", "1234.50"),
        ("1,2,3", "3"),
        ("x = .5", ".5"),
        ("#### 18.0", "18"),
        ("12345,678", "678"),
    ],
)
def test_the_last_number(text: str, number: str):
    assert last_number(text) == Decimal(number)


def test_exact_number():
    assert last_number("none") is None
    assert exact_number("", "so 5 and then 18.0", "18") == 1.0
    assert exact_number("", "so 18 and then 5", "18") == 0.0
    assert exact_number("", "nothing", "18") == 0.0
    with pytest.raises(ValueError, match="no number"):
        exact_number("", "18", "eighteen")


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so it is $\frac{1}{2}$", "0.5", 1.0),
        (r"\boxed{(x+1)^2}", "$x^2+2x+1$", 1.0),
        ("the answer is 7", "8", 0.0),
        ("no idea", "8", 0.0),
    ],
)
def test_math(response: str, answer: str, reward: float):
    assert math_equal("", response, answer) == reward


def test_exact_number_runs_in_a_thread():
    assert scores(Scorer(ExactNumberReward(type="exact_number")), "12", "13") == [1.0, 0.0]


def test_math_runs_in_a_process():
    assert scores(Scorer(MathReward(type="math")), r"\boxed{12}", "13") == [1.0, 0.0]


def test_a_function_of_the_users():
    assert scores(function("length_reward"), "abcd", "a") == [2.0, 0.5]


def test_a_call_over_its_time_or_a_crash_fails_alone_and_the_next_goes_on():
    scorer = function("slow_reward", timeout_s=4.0)
    started = time.monotonic()
    assert scores(scorer, "good", "slow", "good", "crash", "good") == [1.0, None, 1.0, None, 1.0]
    assert time.monotonic() - started < 300


def test_a_call_whose_process_was_killed_is_made_again(tmp_path: Path):
    scorer = function("killed_once_reward", max_failures=1)
    assert scores(scorer, "a", "b", answer=str(tmp_path / "killed")) == [1.0, 1.0]


def test_failures_in_a_row_stop_the_run_with_the_rewards_own_traceback():
    with pytest.raises(RewardError) as caught:
        scores(function("bad_reward", max_failures=3), *["bad"] * 3)
    assert "3 times in a row" in str(caught.value)
    assert "ZeroDivisionError: the reward's own words" in str(caught.value)
    assert 'in bad_reward\n    raise ZeroDivisionError("' in str(caught.value)


def test_a_success_in_between_starts_the_count_again():
    responses = ["bad", "bad", "good", "bad", "bad"]
    assert scores(function("bad_reward", max_failures=3), *responses) == [None, None, 1.0, None, None]


def test_what_is_no_number_has_failed():
    with pytest.raises(RewardError, match="returned 'excellent', wanted a number"):
        scores(function("text_reward", max_failures=1), "a")


def test_a_function_that_cannot_be_imported_is_said_at_the_start():
    with pytest.raises(RewardError, match=r"(?s)could not be loaded.*AttributeError.*not_there"):
        scores(function("not_there"))
