"""Health rules: what in a run's numbers a person should look at, each one sentence with the key to turn.

The running trainer warns with them and the report lists them, each cause at most once. They are computed from the rows
of metrics.jsonl, so that both say the same; only where no step comes about is what the rollouts say meanwhile looked
at, and the report finds that among what was said. One odd token is no illness: means and extremes must be out of bounds
in several rows running. Their reasons are in docs/report.md. No torch here.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

from megatron_a3po.metric_names import APPROXIMATION, UPDATE

MISMATCH = "sampler_trainer/abs_diff/avg"
FILTERED = "rollout/filtered_groups"

PATIENCE = 3  # rows running
MOVING = 10  # the same where the policy may move fast for a while, as at the start of a run
MISMATCH_LIMIT, BF16_MISMATCH_LIMIT = 1e-3, 5e-2
WEIGHT_ERROR_LIMIT = 0.01  # the documented range is 0.001 to 0.01; less is better
WEIGHT_LIMIT = 20.0  # r above it, or below its inverse: of thousands of tokens one may well reach 4 or 0.2
STALENESS_LIMIT = 10.0
FIRST_ROWS = 5  # whose median entropy is where a run comes from
COLLAPSED = 0.1  # of that
FILTERED_LIMIT = 0.9  # share of the finished groups
STARVED = 10  # steps' worth of groups filtered while one batch is waited for
NO_SIGNAL = "no signal"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """Bad where `value` of a row lies beyond `bound`, `patience` rows running; rows without the value do not count."""

    cause: str
    value: Callable[[Row], float | None]
    bound: float
    sentence: str  # with {value} and {bound}
    below: bool = False
    patience: int = PATIENCE

    def is_bad(self, value: float) -> bool:
        return value < self.bound if self.below else value > self.bound


@dataclass(frozen=True)
class Finding:
    """A rule that did not hold, at the step that made it certain."""

    cause: str
    step: int
    sentence: str


class Health:
    """Looks at a run's rows in their order. `config` is the run's, flat: dotted key -> value."""

    def __init__(self, config: Mapping[str, Any], said: Iterable[str] = ()) -> None:
        """said: causes that need not be said again."""
        self._rules = rules(config)
        self._starved = STARVED * (config.get("trainer.prompts_per_step") or math.inf)
        self._entropies: list[float] = []
        self._bad_rows: Counter[str] = Counter()
        self._said = set(said)

    def see(self, row: Row) -> list[Finding]:
        """What this row makes certain that no row before did."""
        found = []
        for rule in [*self._rules, *self._entropy_rule(row)]:
            value = rule.value(row)
            if value is None or rule.cause in self._said:
                continue
            self._bad_rows[rule.cause] = self._bad_rows[rule.cause] + 1 if rule.is_bad(value) else 0
            if self._bad_rows[rule.cause] >= rule.patience:
                found.append(self._say(rule, value, row))
        return found

    def see_waiting(self, step: int, num_filtered: int) -> list[Finding]:
        """What is certain before the batch of `step` is there: so many groups have been filtered since the last one."""
        if num_filtered < self._starved or NO_SIGNAL in self._said:
            return []
        row = {"step": step, FILTERED: num_filtered}
        rule = next(rule for rule in self._rules if rule.cause == NO_SIGNAL)
        return [self._say(rule, cast(float, rule.value(row)), row)]

    def _say(self, rule: Rule, value: float, row: Row) -> Finding:
        self._said.add(rule.cause)
        sentence = rule.sentence.format(value=f"{value:.3g}", bound=f"{rule.bound:.3g}")
        return Finding(rule.cause, int(row["step"]), sentence)

    def _entropy_rule(self, row: Row) -> list[Rule]:
        """Of where this run came from: the level itself says nothing, tasks differ by orders of magnitude."""
        name = f"{UPDATE}/entropy/avg"
        value = number(row, name)
        if len(self._entropies) < FIRST_ROWS:
            self._entropies += [] if value is None else [value]
            return []
        sentence = (
            "the entropy has collapsed to {value}, a tenth of the first steps' is {bound}: give actor.entropy_coef a "
            "small positive value, lower actor.lr, or go back to an earlier checkpoint"
        )
        bound = COLLAPSED * median(self._entropies)
        return [Rule("entropy", lambda row: number(row, name), bound, sentence, below=True)]


def findings(rows: list[dict[str, Any]], config: Mapping[str, Any]) -> list[Finding]:
    """Everything a whole run shows."""
    health = Health(config)
    return [finding for row in rows for finding in health.see(row)]


def rules(config: Mapping[str, Any]) -> list[Rule]:
    """Those whose bound is known before the run."""
    bf16 = bool(config.get("actor.bf16"))
    staleness_key = (
        "rollout.max_staleness"
        if config.get("rollout.fixed_staleness") is None
        else "rollout.fixed_staleness"
    )
    precision = ": set actor.bf16=false, or " if bf16 else ": "
    return [
        Rule(
            "mismatch",
            lambda row: number(row, MISMATCH),
            BF16_MISMATCH_LIMIT if bf16 else MISMATCH_LIMIT,
            "sampler and trainer disagree at equal versions by {value} in the mean log-prob, healthy is below {bound}"
            f"{precision}look at what rollout.engine samples with: precision, rollout.temperature, the weights it got",
        ),
        *(_approximation_rule(method, staleness_key) for method in ("loglinear", "linear")),
        Rule(
            "large importance weight",
            lambda row: number(row, f"{UPDATE}/importance_weight/max"),
            WEIGHT_LIMIT,
            "importance weights reach {value}, healthy is below 4: lower actor.lr or actor.num_mini_batches, or "
            f"{staleness_key}",
        ),
        Rule(
            "small importance weight",
            lambda row: number(row, f"{UPDATE}/importance_weight/min"),
            1 / WEIGHT_LIMIT,
            "importance weights fall to {value}, healthy is above 0.3: lower actor.lr or actor.num_mini_batches, or "
            f"{staleness_key}",
            below=True,
        ),
        Rule(
            "staleness",
            lambda row: number(row, "staleness/max"),
            STALENESS_LIMIT,
            "trained tokens are {value} versions old, beyond {bound} the approximated proximal policy is not known to "
            f"hold: lower {staleness_key}",
            patience=1,
        ),
        Rule(
            NO_SIGNAL,
            _share_without_signal(config),
            FILTERED_LIMIT,
            "nearly every group has equal rewards (a share of {value}), so that the reward cannot move: choose prompts "
            "of another difficulty (data.train), more rollout.samples_per_prompt, or a longer warm_start.steps",
        ),
    ]


def number(row: Row, name: str) -> float | None:
    """A metric that is there and is a finite number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer may have any number of digits
        return None
    return found if math.isfinite(found) else None


def _approximation_rule(method: str, staleness_key: str) -> Rule:
    # At a staleness of 1 the approximation is the behaviour policy: its error is how far a step moves the policy.
    return Rule(
        f"approximation {method}",
        lambda row: number(row, f"{APPROXIMATION}/{method}/importance_weight_abs_error/avg"),
        WEIGHT_ERROR_LIMIT,
        f"{method}'s importance weights are {{value}} from the true ones on average, the documented range is 0.001 to "
        f"{{bound}}: lower actor.lr, or {staleness_key} where tokens are older than one version",
        patience=MOVING,
    )


def _share_without_signal(config: Mapping[str, Any]) -> Callable[[Row], float | None]:
    """Filtered groups of all that finished. Where none are filtered, a gradient of 0 says the same."""
    groups = config.get("trainer.prompts_per_step")

    def share(row: Row) -> float | None:
        filtered, norm = number(row, FILTERED), number(row, "grad_norm")
        if norm == 0:
            return 1.0
        return None if filtered is None or not groups else filtered / (filtered + groups)

    return share
