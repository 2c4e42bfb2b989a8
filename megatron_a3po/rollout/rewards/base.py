"""What a reward is: a plain function of prompt, response and answer. One file per kind beside this one."""

from collections.abc import Callable

from megatron_a3po.config.reward import ExactNumberReward, FunctionReward, MathReward, RewardSection

RewardFunction = Callable[[str, str, str], float]
"""reward(prompt, response, answer): the response as text without special tokens, the final answer of the data row."""


def load_reward(section: RewardSection) -> RewardFunction:
    """The function a configuration names. Only what is asked for is imported."""
    match section:
        case ExactNumberReward():
            from megatron_a3po.rollout.rewards.exact_number import exact_number

            return exact_number
        case MathReward():
            from megatron_a3po.rollout.rewards.math import math_equal

            return math_equal
        case FunctionReward(path=path):
            from megatron_a3po.rollout.rewards.function import import_function

            return import_function(path)
