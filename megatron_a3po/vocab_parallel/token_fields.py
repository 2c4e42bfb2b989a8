"""What the loss layer knows about each trained token besides its hidden state, and the objective that reads
it.

All fields are vectors over the trained tokens, in the order of the rows: already shifted to prediction
positions, already checked on the host. Next: `policy_objective`, the objectives made of these fields.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

Tokens = slice | Tensor  # some of the trained tokens: a run of them, or their indices


@dataclass(frozen=True)
class TokenFields:
    """Fields of the trained tokens; replicated over the tensor-parallel ranks."""

    labels: Int[
        Tensor, "trained"
    ]  # the token each row predicts, 0 .. vocab_size - 1: others are not found out
    behave_logp: Float[Tensor, "trained"]  # as the sampler reported it, at the sampling temperature
    staleness: Int[Tensor, "trained"]  # current_version - version, checked to be >= 0
    advantages: Float[Tensor, "trained"]
    loss_weights: Float[Tensor, "trained"]  # `algorithm.loss_mean`: 1, or 1 / |y_i|
    prox_logp: Float[Tensor, "trained"] | None = None  # recomputed anchor, where there is one
    reference_logp: Float[Tensor, "trained"] | None = None  # frozen reference policy's, for a KL term
    sequence_ids: Int[Tensor, "trained"] | None = None  # 0 .. num_sequences - 1, for sequence-level ratios
    num_sequences: int = 0

    def take(self, tokens: Tokens) -> "TokenFields":
        """The fields of some of the tokens: views of a run, copies at indices."""
        vectors = {k: v[tokens] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **vectors)


# Log-probs [tokens] (requiring gradient) and the fields of the same tokens -> loss [tokens], loss_weights
# applied. Called on a chunk of tokens at a time, it must treat each token on its own: the layer sums and
# differentiates it. One that cannot has an attribute `needs_all_tokens = True` and takes two sweeps.
Objective = Callable[[Float[Tensor, "tokens"], TokenFields], Float[Tensor, "tokens"]]
