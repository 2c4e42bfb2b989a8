"""Advantages from rewards, for n samples of each prompt, on the host in float64.

    grpo           (R - mean) / (std + 1e-5)      mean and unbiased std over the group
    dr_grpo         R - mean                      over the group; goes with the constant loss mean
    rloo            R - mean of the other samples of the group
    reinforce_pp   (R - mean) / (std + 1e-5)      over the whole step's batch

Equal rewards give exactly 0, not what rounding leaves of a mean. A group of one has nothing to be compared
with, and is refused wherever the group is the baseline.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float64

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"]
STD_FLOOR = 1e-5


def group_advantages(
    rewards: Float64[np.ndarray, "groups samples"], estimator: Estimator
) -> Float64[np.ndarray, "groups samples"]:
    """One advantage per sample; rewards are the whole step's, groups in rows.

    Sources: GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu
    2025).
    """
    compared = rewards.reshape(1, -1) if estimator == "reinforce_pp" else rewards
    num_compared = compared.shape[1]
    if num_compared < 2:
        raise ValueError(
            f"{estimator} compares samples with each other: it needs at least 2, and found {num_compared}"
        )
    centred = _centred(compared)
    match estimator:
        case "grpo" | "reinforce_pp":
            advantages = centred / (compared.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR)
        case "dr_grpo":
            advantages = centred
        case "rloo":  # R - (sum - R) / (n - 1) = (R - mean) * n / (n - 1)
            advantages = centred * num_compared / (num_compared - 1)
    return advantages.reshape(rewards.shape)


def _centred(rewards: Float64[np.ndarray, "rows samples"]) -> Float64[np.ndarray, "rows samples"]:
    all_equal = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return np.where(all_equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
