"""What the loss layer knows about each trained token besides its hidden state, and the objective that reads
it.

All fields are vectors over the trained tokens, in the order of the rows: already shifted to prediction
positions, already checked on the host. Next: `policy_objective`, the objectives made of these fields.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenFields:
    """Fields of the trained tokens; replicated over the tensor-parallel ranks."""

    labels: Int[Tensor, "trained"]  # the token each row predicts
    behave_logp: Float[Tensor, "trained"]  # as the sampler reported it, at the sampling temperature
    staleness: Int[Tensor, "trained"]  # current_version - version, checked to be >= 0
    advantages: Float[Tensor, "trained"]
    loss_weights: Float[Tensor, "trained"]  # `algorithm.loss_mean`: 1, or 1 / |y_i|
    prox_logp: Float[Tensor, "trained"] | None = None  # recomputed anchor, where there is one

    def slice(self, start: int, stop: int) -> "TokenFields":
        """The fields of the tokens start..stop-1, as views."""
        tokens = slice(start, stop)
        return TokenFields(
            self.labels[tokens],
            self.behave_logp[tokens],
            self.staleness[tokens],
            self.advantages[tokens],
            self.loss_weights[tokens],
            None if self.prox_logp is None else self.prox_logp[tokens],
        )


# Log-probs [tokens] (requiring gradient) and the fields of the same tokens -> loss [tokens], loss_weights
# applied. Called on a chunk of tokens at a time, it must treat each token on its own: the layer sums and
# differentiates it.
Objective = Callable[[Float[Tensor, "tokens"], TokenFields], Float[Tensor, "tokens"]]
