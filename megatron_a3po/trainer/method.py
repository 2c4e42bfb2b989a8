"""The three switches, resolved once at start-up: which anchor each mini-batch gets, and which passes that costs.

coupled              behaviour log-prob                                          no pass
loglinear, linear    interpolated from behaviour and target                      no pass
recompute, metrics   mini-batch 1: stop-gradient of its own log-prob             no pass
                     mini-batches 2..n: scored with the step's first weights     one pass over them
forced recompute     every mini-batch scored                                     one pass over all

A KL term (`actor.kl_coef`) adds a pass over all mini-batches under the frozen reference, whatever the anchor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_a3po.algorithm.proximal import METHODS
from megatron_a3po.algorithm.proximal import Method as Approximation
from megatron_a3po.algorithm.statistics import (
    Statistics,
    approximation_statistics,
    policy_statistics,
    recomputed_statistics,
    reference_statistics,
    sampler_statistics,
)
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.vocab_parallel import LossOutput, TokenFields
from megatron_a3po.vocab_parallel.policy_objective import (
    Anchor,
    ClippedObjective,
    PolicyObjective,
    SequenceObjective,
    interpolated,
    own_anchor,
    recomputed_anchor,
    rollout_anchor,
)

Name = Literal["coupled", "loglinear", "linear", "recompute", "metrics"]
RATIOS: dict[str, type[ClippedObjective]] = {"token": PolicyObjective, "sequence": SequenceObjective}


@dataclass(frozen=True)
class Method:
    """How the proximal policy is had, and what is measured about it."""

    name: Name
    force_every_token: bool
    actor: ActorSection

    @classmethod
    def of(cls, actor: ActorSection) -> "Method":
        name: Name = actor.prox_logp_method if actor.use_decoupled_loss else "coupled"
        return cls(name, actor.recompute_every_token, actor)

    def needs_pass(self, mini_batch: int) -> bool:
        """Whether mini-batch `mini_batch` (from 0) is scored before the first optimizer step."""
        return self.name in ("recompute", "metrics") and (mini_batch > 0 or self.force_every_token)

    @property
    def entropy_coef(self) -> float:
        """Weight of the entropy bonus; the loss layer has the entropies."""
        return self.actor.entropy_coef

    def objective(self, mini_batch: int) -> ClippedObjective:
        """The clipped loss of a mini-batch around its anchor, with a ratio per token or per sequence."""
        actor = self.actor
        return RATIOS[actor.importance_ratio](
            self._anchor(mini_batch),
            eps_low=actor.eps_low,
            eps_high=actor.eps_high,
            dual_clip=actor.dual_clip,
            behave_weight="off" if actor.behave_weight == "off_at_any_staleness" else actor.behave_weight,
            behave_weight_cap=actor.behave_weight_cap,
            kl_coef=actor.kl_coef,
        )

    def measure(
        self, mini_batch: int, objective: ClippedObjective, output: LossOutput, fields: TokenFields
    ) -> list[Statistics]:
        """What is reported of one micro-batch of trained tokens, on the device."""
        logp, behave_logp, staleness = output.logp, fields.behave_logp, fields.staleness
        found = [policy_statistics(objective.token_loss(logp, fields), logp, behave_logp, output.entropy)]
        if mini_batch == 0:
            # The only mini-batch whose target still has the weights of current_version.
            found.append(sampler_statistics(logp, behave_logp, staleness))
        if fields.reference_logp is not None:
            found.append(reference_statistics(fields.reference_logp, logp))
        truth = self._truth(mini_batch, logp, fields)
        if truth is not None:
            found.append(recomputed_statistics(truth))
        for approximation in self._measured_approximations():
            known = truth if self.name == "metrics" else None
            found.append(approximation_statistics(approximation, behave_logp, logp, staleness, known))
        return found

    def _anchor(self, mini_batch: int) -> Anchor:
        match self.name:
            case "coupled":
                return rollout_anchor
            case "loglinear" | "linear":
                return interpolated(self.name)
            case _:
                return recomputed_anchor if self.needs_pass(mini_batch) else own_anchor

    def _truth(self, mini_batch: int, logp: Tensor, fields: TokenFields) -> Tensor | None:
        """The recomputed proximal log-prob where it is known without a pass of its own."""
        if fields.prox_logp is not None:
            return fields.prox_logp
        return logp if mini_batch == 0 and self.name != "coupled" else None

    def _measured_approximations(self) -> Sequence[Approximation]:
        match self.name:
            case "metrics":
                return METHODS
            case "loglinear" | "linear":
                return (self.name,)
            case _:
                return ()
