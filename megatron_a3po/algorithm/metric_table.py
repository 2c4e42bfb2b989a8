"""Every metric a run reports: its name, its formula, its healthy range, and where its numbers come from.

Metrics with a `quantity` are made here, from the step's merged `Statistics`; the others are named here and made
where their numbers are: in the trainer's loop, in the rollout process. `docs/metrics.md` is this table written out
by `tools/write_metrics_page.py`; a test holds page, table and `statistics` together.
"""

from dataclasses import dataclass

from megatron_a3po.algorithm.proximal import METHODS
from megatron_a3po.algorithm.statistics import Statistics
from megatron_a3po.metric_names import APPROXIMATION, UPDATE


@dataclass(frozen=True)
class Metric:
    """One reported number; `<...>` in a name stands for several."""

    name: str
    formula: str
    healthy: str
    quantity: str | None = None  # row of the step's `Statistics`
    part: str = "avg"  # what is reported of it: avg, sum, count, min or max


TRAINING = (
    Metric(
        "loss",
        "what is minimised, entropy and KL terms included: the mean `actor.loss_mean` names, averaged over the step's "
        "mini-batches",
        "small",
    ),
    Metric(
        "grad_norm", "of the whole gradient before clipping, averaged over mini-batches", "no sudden jumps"
    ),
    Metric("reward/avg", "over all scored trajectories, before the no-signal filter", "rises"),
    Metric("staleness/avg", "mean of d over the trained tokens", "0 to `rollout.max_staleness`"),
    Metric("staleness/max", "largest d of a trained token", "within the bound, but for the policy `train`"),
    Metric("staleness/histogram", "trained tokens of each d", "no mass beyond the bound"),
    Metric("tokens/trained", "trained tokens of the step", "steady"),
    Metric(
        "forwards_per_token",
        "tokens through the model's forward / tokens of the batch",
        "1; for `recompute` with n mini-batches 1 + (n - 1) / n; 1 more with `actor.kl_coef`",
    ),
    Metric("steps_skipped", "mini-batches whose update was not applied", "0"),
    Metric("rollout/dropped_groups", "groups dropped for being over the staleness bound", "0 but for `drop`"),
    Metric("rollout/filtered_groups", "groups of equal rewards, not trained on", "well below half"),
    Metric("rollout/truncated", "samples that ended at `rollout.max_response_tokens`", "few"),
    Metric(
        "rollout/failed_groups", "groups whose reward could not be computed; their prompts are replaced", "0"
    ),
    Metric("rollout/aborted", "samples the engine gave up; they are generated again", "0"),
    Metric("rollout/lost_requests", "requests lost with a vLLM server; they are made again elsewhere", "0"),
    Metric(
        "rollout/discarded_tokens",
        "tokens that a vLLM server sampled with weights of another attempt; they are generated again",
        "0",
    ),
    Metric("rollout/restarts", "times the rollout process died and was started again", "0"),
    Metric(
        "rollout/tokens_per_s",
        "tokens sampled a second since the batch before",
        "above `tokens/trained` a step",
    ),
    Metric(
        "rollout/idle_s",
        "seconds since the batch before in which nothing to train on was asked of the engine",
        "0: generation never waits; at the staleness bound it must",
    ),
    Metric(
        "rollout/sampled_while_training",
        "tokens sampled between the step's first forward and last backward",
        "> 0",
    ),
    Metric(
        "rollout/multi_version_fraction",
        "share of the trained responses with tokens of several versions",
        "any",
    ),
    Metric(
        "evaluation/accuracy",
        "greedy accuracy on data.held_out, in the row of the step in which it came in",
        "rises",
    ),
    Metric("evaluation/version", "version of the weights that accuracy is of", "a few steps back"),
    Metric(
        "memory/rank_bytes",
        "the most memory a trainer rank has had resident since it started, of all ranks",
        "does not grow",
    ),
    Metric(
        "memory/rollout_bytes",
        "the same of the rollout process, its engine `local` included",
        "does not grow",
    ),
    Metric(
        "memory/device_bytes",
        "the most memory torch has allocated on a GPU during the step, of all ranks; absent without GPUs",
        "steady",
    ),
    Metric("publish/bytes", "of the weights in the servers' latest update", "the model's size"),
    Metric(
        "publish/duration_s",
        "seconds from the announcement of weights until all servers generate with them",
        "below `time/step`",
    ),
    Metric("publish/gb_per_s", "publish/bytes / publish/duration_s / 1e9", "near the network's"),
    Metric(
        "publish/stall_s",
        "seconds generation stood still for it, on the slowest server",
        "`rollout.weight_staging=host` lowers it",
    ),
    Metric("time/<part>", "seconds spent in one part of the step", "most of them in forward and backward"),
    Metric("time/step", "seconds of the whole step, from the row before to this one", "steady"),
)

_RATIO, _WEIGHT = (
    "r = exp(logp - prox_logp), before the clip",
    "w = exp(prox_logp - behave_logp), before the cap",
)
_CLIPPED = "tokens where the clip decides: clip(r) A < r A"
UPDATES = (
    Metric(f"{UPDATE}/importance_weight/avg", f"mean {_RATIO}", "0.95 to 1.05", "importance_weight"),
    Metric(f"{UPDATE}/importance_weight/min", f"least {_RATIO}", "above 0.3", "importance_weight", "min"),
    Metric(f"{UPDATE}/importance_weight/max", f"largest {_RATIO}", "below 4", "importance_weight", "max"),
    Metric(f"{UPDATE}/behave_imp_weight/avg", f"mean {_WEIGHT}", "0.9 to 1.1", "behave_imp_weight"),
    Metric(f"{UPDATE}/behave_imp_weight/min", f"least {_WEIGHT}", "above 0.1", "behave_imp_weight", "min"),
    Metric(
        f"{UPDATE}/behave_imp_weight/max", f"largest {_WEIGHT}", "below the cap", "behave_imp_weight", "max"
    ),
    Metric(f"{UPDATE}/clipped_tokens", f"number of {_CLIPPED}", "see `clip_ratio`", "clipped", "sum"),
    Metric(f"{UPDATE}/clip_ratio", f"share of {_CLIPPED}", "below 0.1", "clipped"),
    Metric(
        f"{UPDATE}/entropy/avg", "mean -sum_v p_v log p_v, over the vocabulary", "falls slowly", "entropy"
    ),
    Metric(f"{UPDATE}/kl/avg", "k3, behaviour to target: mean exp(t - b) - 1 - (t - b)", "below 0.1", "kl"),
    Metric(
        f"{UPDATE}/reference_kl/avg",
        "k3, target to the frozen reference f, with `actor.kl_coef`: mean exp(f - t) - 1 - (f - t)",
        "rises slowly",
        "reference_kl",
    ),
)

_DIFFERENCE = "abs(t - b) over the tokens of mini-batch 1 with d = 0"
SAMPLER = (
    Metric("sampler_trainer/abs_diff/avg", f"mean {_DIFFERENCE}", "1e-4; 2e-2 in bf16", "sampler_trainer"),
    Metric(
        "sampler_trainer/abs_diff/max",
        f"largest {_DIFFERENCE}",
        "1e-3; 0.2 in bf16",
        "sampler_trainer",
        "max",
    ),
    Metric("sampler_trainer/tokens", "number of those tokens", "any", "sampler_trainer", "count"),
)

_COLUMNS = {
    "approx_logp": ("a", "near `prox_logp_gt`"),
    "behave_imp_weight": ("exp(a - b)", "0.9 to 1.1"),
    "importance_weight": ("exp(t - a)", "0.95 to 1.05"),
    "abs_error": ("abs(a - g)", "below `rollout`'s"),
    "squared_error": ("(a - g)^2", "below `rollout`'s"),
    "rel_error": ("100 abs(a - g) / (abs(g) + 1e-8), percent", "below `rollout`'s"),
    "behave_imp_weight_abs_error": ("abs(exp(a - b) - exp(g - b))", "below `rollout`'s"),
    "behave_imp_weight_rel_error": ("the same in percent of exp(g - b)", "below `rollout`'s"),
    "importance_weight_abs_error": ("abs(exp(t - a) - exp(t - g))", "below `rollout`'s"),
    "importance_weight_rel_error": ("the same in percent of exp(t - g)", "below `rollout`'s"),
}
APPROXIMATIONS = (
    Metric(
        f"{APPROXIMATION}/prox_logp_gt/avg", "mean g, where it is known", "as `approx_logp`", "prox_logp_gt"
    ),
    *(
        Metric(f"{APPROXIMATION}/{method}/{column}/avg", f"mean {formula}", healthy, f"{method}/{column}")
        for method in METHODS
        for column, (formula, healthy) in _COLUMNS.items()
    ),
)

SECTIONS = {
    "Training": TRAINING,
    "Policy update": UPDATES,
    "Sampler and trainer": SAMPLER,
    "Approximations of the proximal policy": APPROXIMATIONS,
}
TABLE: tuple[Metric, ...] = tuple(metric for metrics in SECTIONS.values() for metric in metrics)

# Every rank packs its statistics in this order, whatever it measured: one collective a step, no talk about names.
QUANTITIES: tuple[str, ...] = tuple(dict.fromkeys(metric.quantity for metric in TABLE if metric.quantity))


def report(statistics: Statistics) -> dict[str, float]:
    """The metrics of a step from its merged statistics; what nobody measured is absent, never 0.

    The one place that reads statistics from the device, once.
    """
    rows = dict(zip(statistics.names, statistics.table.tolist(), strict=True))
    values: dict[str, float] = {}
    for metric in TABLE:
        total, count, lowest, highest = rows.get(metric.quantity or "", (0.0, 0.0, 0.0, 0.0))
        if count > 0:
            parts = {"avg": total / count, "sum": total, "count": count, "min": lowest, "max": highest}
            values[metric.name] = parts[metric.part]
    return values


def as_markdown() -> str:
    """The table as docs/metrics.md has it."""
    lines = [_OPENING]
    for title, metrics in SECTIONS.items():
        lines += ["", f"## {title}", "", "| name | formula | healthy |", "|---|---|---|"]
        lines += [f"| `{metric.name}` | {metric.formula} | {metric.healthy} |" for metric in metrics]
    return "\n".join(lines) + "\n"


_OPENING = """\
# Metrics

<!-- Written by tools/write_metrics_page.py from megatron_a3po/algorithm/metric_table.py; change it there. -->

One object per step in `metrics.jsonl`, and the same names in TensorBoard and Weights & Biases. Every `/avg` below the
first section is a mean over the trained tokens of the whole step, one weight each, exact over all ranks; a `max` is a
max. A metric without values in a step is absent, never 0.

In the formulas b is the behaviour log-prob, t the target's (detached, in its own mini-batch), g the recomputed
proximal log-prob, a its approximation by the method named in the metric, A the advantage, and
d = current_version - version the staleness. g is known for every token in `recompute` and `metrics`, and for those
of mini-batch 1, where it is t itself, in `loglinear` and `linear`. Errors of the approximations exist in `metrics`.

With `actor.importance_ratio: sequence` r, w and the clip are a sequence's, and each of its trained tokens counts them
once: `clipped_tokens` is the number of tokens in clipped sequences, an `/avg` weighs a sequence by its length. The
approximations are of tokens all the same."""
