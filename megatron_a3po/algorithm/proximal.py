"""The proximal policy from log-probabilities that are already there: the idea of A-3PO.

Decoupled PPO clips against a *proximal* policy, the trust-region anchor, and pays a forward pass for its
log-probs. Here the anchor is interpolated between the behaviour policy, which produced the token, and the
target policy, whose log-probs the training forward computes anyway. The share of each depends on the token's
staleness alone:

    loglinear   log pi_prox = alpha * log pi_behave + (1 - alpha) * log pi_theta
    linear      log pi_prox = log(alpha * pi_behave + (1 - alpha) * pi_theta)
    rollout     log pi_prox = log pi_behave                                 (measured, never trained with)

with alpha = 1 / max(d, 1). The anchor never carries gradient. Next: `policy_loss`.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_a3po.algorithm.staleness import NOT_GENERATED, behave_share

Method = Literal["loglinear", "linear", "rollout"]
METHODS: tuple[Method, ...] = ("loglinear", "linear", "rollout")


def interpolate(
    behave_logp: Float[Tensor, "*shape"],
    logp: Float[Tensor, "*shape"],
    staleness: Int[Tensor, "*shape"],
    method: Method,
) -> Float[Tensor, "*shape"]:
    """log pi_prox of tokens whose staleness was checked when the batch was built; no gradient, no host read.

    At d <= 1 the behaviour log-prob is *selected*, not multiplied by 1 and added to 0 times the target's: an
    infinite target log-prob stays harmless there. Source: A-3PO, eq. 3-5.
    """
    behave_logp, logp = behave_logp.detach(), logp.detach()
    alpha = behave_share(staleness, logp.dtype)
    match method:
        case "loglinear":
            mixed = alpha * behave_logp + (1 - alpha) * logp
        case "linear":
            mixed = torch.logaddexp(behave_logp + alpha.log(), logp + (1 - alpha).log())
        case "rollout":
            mixed = behave_logp
    return torch.where(staleness <= 1, behave_logp, mixed)


def approximate_proximal_logp(
    behave_logp: Float[Tensor, "*shape"],
    logp: Float[Tensor, "*shape"],
    versions: Int[Tensor, "*shape"],
    current_version: int,
    method: str,
) -> Float[Tensor, "*shape"]:
    """The method in one function, for any trainer: log pi_prox per token, for tensors of any shape.

    behave_logp      log-probs the sampler reported, at the sampling temperature
    logp             log-probs of the policy being trained; detached here, the result carries no gradient
    versions         version of the weights behind each token, -1 where nobody generated it (gives behave_logp)
    current_version  version the training step began with, the same for all its mini-batches
    method           "loglinear", "linear" or "rollout"

    Checks its input, which reads from the device once: ValueError for an unknown method or a version outside
    -1..current_version. Inside a training step use `interpolate`, on tokens checked when the batch was built.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    wrong = (versions < NOT_GENERATED) | (versions > current_version)
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        found = versions[tuple(position)].tolist()
        raise ValueError(
            f"versions{position} is {found}; it must lie between -1 and current_version, {current_version}"
        )
    staleness = torch.where(versions == NOT_GENERATED, 0, current_version - versions)
    return interpolate(behave_logp, logp, staleness, method)
