"""What a training step measures: sums, counts, minima and maxima that merge exactly.

A `Statistics` is one [names, 4] tensor on the device. Micro-batches merge into each other as they come; after
the step one all-gather and one local merge make every rank's numbers the whole step's, so an average is a
mean over tokens and a reported maximum is a maximum. Nothing here reads the device. The three functions below
turn the vectors of a micro-batch into such rows; which of them are reported, and under which name, is
`metric_table`'s.

Row of a quantity nobody measured: sum 0, count 0, min +inf, max -inf, the neutral element of the merge.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from megatron_a3po.algorithm.policy_loss import TokenLoss
from megatron_a3po.algorithm.proximal import Method, interpolate

COLUMNS = ("sum", "count", "min", "max")


@dataclass(frozen=True)
class Statistics:
    """Summaries of named quantities; `table` holds one row (sum, count, min, max) per name."""

    names: tuple[str, ...]
    table: Float64[Tensor, "names 4"]

    @classmethod
    def empty(cls, names: Sequence[str], device: torch.device | str = "cpu") -> "Statistics":
        """Nothing measured yet, for each name."""
        table = torch.zeros(len(names), len(COLUMNS), dtype=torch.float64, device=device)
        table[:, 2], table[:, 3] = torch.inf, -torch.inf
        return cls(tuple(names), table)

    @classmethod
    def of(
        cls, values: dict[str, Float[Tensor, "tokens"]], where: Bool[Tensor, "tokens"] | None = None
    ) -> "Statistics":
        """Summaries of vectors, one per name, over the tokens of `where` (default: all)."""
        return cls(tuple(values), torch.stack([_summary(vector, where) for vector in values.values()]))

    def aligned(self, names: Sequence[str]) -> "Statistics":
        """The rows of `names` in that order, empty where nothing was measured; every measured name is kept."""
        if tuple(names) == self.names:
            return self
        missing = set(self.names) - set(names)
        if missing:
            raise KeyError(f"measured, but not among the names to align with: {', '.join(sorted(missing))}")
        rows = dict(zip(self.names, self.table, strict=True))
        empty = Statistics.empty(("",), self.table.device).table[0]
        return type(self)(tuple(names), torch.stack([rows.get(name, empty) for name in names]))

    def merge(self, other: "Statistics") -> "Statistics":
        """The summaries of both together, over the union of their names."""
        names = tuple(dict.fromkeys(self.names + other.names))
        return self.merged(names, torch.stack([self.aligned(names).table, other.aligned(names).table]))

    @classmethod
    def merged(cls, names: Sequence[str], tables: Float64[Tensor, "parts names 4"]) -> "Statistics":
        """Many tables over the same names into one: the local half of the step's only collective."""
        total, lowest, highest = tables[..., :2].sum(0), tables[..., 2].amin(0), tables[..., 3].amax(0)
        return cls(tuple(names), torch.cat([total, lowest[:, None], highest[:, None]], dim=1))


def _summary(values: Float[Tensor, "tokens"], where: Bool[Tensor, "tokens"] | None) -> Float64[Tensor, "4"]:
    if values.numel() == 0:
        return Statistics.empty(("",), values.device).table[0]
    values = values.detach().double()
    if where is None:
        count = torch.full_like(values[0], values.numel())
        return torch.stack([values.sum(), count, values.amin(), values.amax()])
    total = torch.where(where, values, 0.0).sum()
    lowest, highest = (
        torch.where(where, values, torch.inf).amin(),
        torch.where(where, values, -torch.inf).amax(),
    )
    return torch.stack([total, where.sum().double(), lowest, highest])


def policy_statistics(
    token_loss: TokenLoss,
    logp: Float[Tensor, "trained"],
    behave_logp: Float[Tensor, "trained"],
    entropy: Float[Tensor, "trained"],
) -> Statistics:
    """Ratio, weight, clip, entropy and k3 divergence (behaviour to target) of the trained tokens.

    k3 = exp(t - b) - 1 - (t - b)      >= 0; its mean under the behaviour policy is KL(behave || target)
    """
    log_ratio = logp.detach() - behave_logp
    return Statistics.of(
        {
            "importance_weight": token_loss.importance_weight,
            "behave_imp_weight": token_loss.behave_imp_weight,
            "clipped": token_loss.clipped.to(logp.dtype),
            "entropy": entropy,
            "kl": torch.expm1(log_ratio) - log_ratio,
        }
    )


def sampler_statistics(
    logp: Float[Tensor, "trained"], behave_logp: Float[Tensor, "trained"], staleness: Int[Tensor, "trained"]
) -> Statistics:
    """|trainer - sampler| log-prob on tokens of equal versions: d = 0, and only in a step's first mini-batch."""
    return Statistics.of({"sampler_trainer": (logp.detach() - behave_logp).abs()}, where=staleness == 0)


def recomputed_statistics(prox_logp: Float[Tensor, "trained"]) -> Statistics:
    """The recomputed proximal log-prob itself, wherever it is known."""
    return Statistics.of({"prox_logp_gt": prox_logp})


def reference_statistics(
    reference_logp: Float[Tensor, "trained"], logp: Float[Tensor, "trained"]
) -> Statistics:
    """k3 divergence of the target from the frozen reference, as the KL term has it: exp(f - t) - 1 - (f - t)."""
    log_ratio = reference_logp - logp.detach()
    return Statistics.of({"reference_kl": torch.expm1(log_ratio) - log_ratio})


def approximation_statistics(
    method: Method,
    behave_logp: Float[Tensor, "trained"],
    logp: Float[Tensor, "trained"],
    staleness: Int[Tensor, "trained"],
    recomputed_logp: Float[Tensor, "trained"] | None = None,
) -> Statistics:
    """What the approximate anchor a is, and, where the recomputed g is known (`metrics` mode), how far it
    lies from it.

    With t the detached target and b the behaviour: weights exp(a - b) and ratios exp(t - a), beside exp(g -
    b) and exp(t - g). Relative errors are in percent, 100 |x - y| / (|y| + 1e-8).
    """
    target, truth = logp.detach(), recomputed_logp
    approx = interpolate(behave_logp, target, staleness, method)
    weight, ratio = torch.exp(approx - behave_logp), torch.exp(target - approx)
    values = {"approx_logp": approx, "behave_imp_weight": weight, "importance_weight": ratio}
    if truth is not None:
        true_weight, true_ratio = torch.exp(truth - behave_logp), torch.exp(target - truth)
        values |= {
            "abs_error": (approx - truth).abs(),
            "squared_error": (approx - truth).square(),
            "rel_error": _percent_error(approx, truth),
            "behave_imp_weight_abs_error": (weight - true_weight).abs(),
            "behave_imp_weight_rel_error": _percent_error(weight, true_weight),
            "importance_weight_abs_error": (ratio - true_ratio).abs(),
            "importance_weight_rel_error": _percent_error(ratio, true_ratio),
        }
    return Statistics.of({f"{method}/{name}": vector for name, vector in values.items()})


def _percent_error(found: Tensor, truth: Tensor) -> Tensor:
    return 100 * (found - truth).abs() / (truth.abs() + 1e-8)
