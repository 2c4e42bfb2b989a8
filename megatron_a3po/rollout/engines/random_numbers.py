"""The random numbers of a sample: a function of (seed, prompt_index, sample, turn) and of nothing else.

Drawn once when the sample begins, one number per response token, so that neither the other sequences of a batch nor
an interruption by new weights can move them.
"""

import numpy as np
import numpy.typing as npt


def sample_uniforms(
    seed: int, prompt_index: int, sample: int, num_tokens: int, turn: int = 0
) -> npt.NDArray[np.float64]:
    """`num_tokens` numbers in [0, 1). A longer draw begins with the numbers of a shorter one."""
    # Sample and turn sit in the highest words of Philox's 256-bit counter: their streams never meet.
    bits = np.random.Philox(key=[seed, prompt_index], counter=[0, 0, turn, sample])
    return np.random.Generator(bits).random(num_tokens)
