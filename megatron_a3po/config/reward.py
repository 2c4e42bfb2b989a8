"""The `reward` section: a union on `type`, one class for each kind of reward."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_a3po.config.section import Section


class Reward(Section):
    """What all rewards share."""

    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds one call may take; one that takes longer has failed."""

    max_failures: int = Field(default=8, ge=1)
    """That many failed calls in a row stop the run, with the reward's own traceback."""


class ExactNumberReward(Reward):
    """1 if the last number of the response equals the answer (GSM8K's `####` is understood), else 0."""

    type: Literal["exact_number"]


class MathReward(Reward):
    """1 if a mathematics checker finds the response's expression equal to the answer, else 0."""

    type: Literal["math"]


class FunctionReward(Reward):
    """A function of yours."""

    type: Literal["function"]

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Where the function is, as `module:function`."""


RewardSection = Annotated[ExactNumberReward | MathReward | FunctionReward, Field(discriminator="type")]
