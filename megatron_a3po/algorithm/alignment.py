"""One alignment for all token fields: position t scores token t+1.

A language model's output at position t is a distribution over the token at t+1. Labels, behaviour
log-probabilities, versions, masks and advantages are recorded per *token*; here, and nowhere else, they
become fields per *prediction*. Next: `staleness`, which turns the shifted versions into the method's only
extra input.
"""

import numpy as np
from jaxtyping import Shaped


def shift_to_predictions(
    field: Shaped[np.ndarray, "length"], fill: float | int
) -> Shaped[np.ndarray, "length"]:
    """Moves a per-token field to the positions that predict the tokens: out[t] = field[t+1], out[-1] = fill.

    The last position predicts nothing, so `fill` must be the field's "not trained" value (mask 0, version
    -1).

        tokens     P   P  R1  R2  R3          versions  -1  -1   3   3   7
        position   0   1   2   3   4          shifted   -1   3   3   7  fill
    """
    shifted = np.empty_like(field)
    shifted[:-1] = field[1:]
    shifted[-1:] = fill
    return shifted
