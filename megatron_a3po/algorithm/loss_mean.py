"""Which mean the loss is: weights inside the sum, and one integer denominator outside.

    token       sum_t loss_t / N_tokens
    sequence    sum_i (sum_t loss_t / |y_i|) / N_sequences
    constant    sum_t loss_t / (N_sequences * max_response_tokens)               (Dr. GRPO)

The numerator is a sum of weighted token losses, the denominator an integer that adds up over micro-batches
and data-parallel ranks: one division at the end is exact, however the mini-batch was cut. |y_i| counts
trained tokens; a sequence without any is no sequence.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float32, Int

LossMean = Literal["token", "sequence", "constant"]


def loss_weights(
    response_lengths: Int[np.ndarray, "sequences"], mean: LossMean
) -> Float32[np.ndarray, "trained"]:
    """The weight of every trained token, sequence after sequence: 1, or 1 / |y_i| for the sequence mean."""
    weights = 1.0 / np.maximum(response_lengths, 1) if mean == "sequence" else np.ones(len(response_lengths))
    return np.repeat(weights, response_lengths).astype(np.float32)


def denominator(
    response_lengths: Int[np.ndarray, "sequences"], mean: LossMean, max_response_tokens: int
) -> int:
    """What the weighted sum over these sequences is divided by; denominators of disjoint parts add up."""
    num_sequences = int(np.count_nonzero(response_lengths))
    match mean:
        case "token":
            return int(response_lengths.sum())
        case "sequence":
            return num_sequences
        case "constant":
            return num_sequences * max_response_tokens
