"""Staleness: how many training steps lie between the weights that produced a token and the ones it trains.

    d = current_version - version          current_version is the version the step began with

The same current_version holds through all mini-batches of a step. Version -1 marks tokens nobody generated
(prompt, pad). Versions are host integers when a batch is built, so that is where they are checked, once; on
the device only the staleness travels. Next: `proximal`.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

NOT_GENERATED = -1


def behave_share(
    staleness: Int[Tensor, "*shape"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    """The behaviour policy's share in the anchor: alpha(d) = 1 / max(d, 1).

    A fresh token (d = 0 or 1) is anchored at the policy that produced it; the older it is, the closer the
    anchor moves to the target. Source: A-3PO, eq. 3-5 (the method's own documentation calls 1 - alpha alpha).
    """
    return staleness.clamp(min=1).to(dtype).reciprocal()


def trained_staleness(
    versions: Int[np.ndarray, "trained"], current_version: int, owner: str = "trained tokens"
) -> Int[np.ndarray, "trained"]:
    """Staleness of the trained tokens, on the host, as int32; `owner` names the trajectory in the error.

    Raises ValueError for a token without a version and for one from the future: training on either is a
    mistake upstream that no later arithmetic can see.
    """
    for wrong, why in (
        (versions <= NOT_GENERATED, "which marks a token nobody generated"),
        (versions > current_version, f"newer than the current version {current_version}"),
    ):
        if wrong.any():
            position = int(wrong.argmax())
            raise ValueError(
                f"{owner}: trained token {position} has version {int(versions[position])}, {why}"
            )
    return (current_version - versions).astype(np.int32)
