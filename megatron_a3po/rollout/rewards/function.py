"""A reward function of the user's, by import path."""

import importlib
from typing import cast

from megatron_a3po.rollout.rewards.base import RewardFunction


def import_function(path: str) -> RewardFunction:
    """`module:function`. Whatever importing it raises is the user's to see."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"reward.path={path} is a {type(function).__name__}, not a function")
    return cast(RewardFunction, function)
