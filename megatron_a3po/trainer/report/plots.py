"""The plots of a report, in the order of the page. A plot without a number in any run is left out.

With one run each line has its own look; with several a run is a colour, and lines differ by their dashes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megatron_a3po.metric_names import APPROXIMATION, UPDATE
from megatron_a3po.trainer.report import curves
from megatron_a3po.trainer.report.curves import POINTS, Row, Value, metric, quotient, scaled
from megatron_a3po.trainer.report.past import Past

MOST_POINTS = 4 * POINTS  # of one line over all runs
LEAST_POINTS = 200
SMOOTHED_SHARE = 50  # a moving mean is over 1/50 of the steps
GIB = 2.0**-30
PARTS = {"mean": "avg", "largest": "max", "least": "min"}


@dataclass(frozen=True)
class Line:
    """One number of every step; `smooth` adds a moving mean over a fiftieth of the run."""

    label: str
    value: Value
    smooth: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines over the same steps, of all runs."""

    title: str
    note: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Stack:
    """Parts of a whole over the steps, of one run."""

    title: str
    note: str
    parts: Callable[[Sequence[Row], int], dict[str, Any]]
    ordered: bool = False  # its parts are numbers, and their colours a scale


def update(quantity: str, *labels: str) -> tuple[Line, ...]:
    """Lines of a quantity of the policy update."""
    return tuple(Line(label, metric(f"{UPDATE}/{quantity}/{PARTS[label]}")) for label in labels)


REWARD = Plot(
    "Sampled reward",
    "Mean over all scored samples of a step, before groups without signal are filtered.",
    (Line("reward", metric("reward/avg"), smooth=True),),
)
LEARNING = (
    Plot("Loss", "What is minimised; its level says little.", (Line("loss", metric("loss")),)),
    Plot("Entropy", "Should fall slowly. A sudden fall is a collapse.", update("entropy", "mean")),
    Plot("Gradient norm", "Before clipping.", (Line("gradient norm", metric("grad_norm")),)),
)
AGES = Stack(
    "Trained tokens by staleness",
    "The share of each staleness among a step's trained tokens.",
    curves.shares_by_staleness,
    ordered=True,
)
STALENESS = (
    Plot(
        "Staleness",
        "How many versions older than the trainer's weights a trained token is.",
        (Line("largest", metric("staleness/max")), Line("mean", metric("staleness/avg"))),
    ),
    Plot(
        "Responses of several versions",
        "The share of trained responses that were continued under new weights.",
        (Line("share", metric("rollout/multi_version_fraction")),),
    ),
)
TRUST = (
    Plot(
        "Sampler against trainer",
        "|log-prob difference| of tokens of the trainer's own version. Healthy: below 1e-3, in bf16 below 0.05.",
        (
            Line("largest", metric("sampler_trainer/abs_diff/max")),
            Line("mean", metric("sampler_trainer/abs_diff/avg")),
        ),
    ),
    Plot(
        "Importance weight",
        "Target over proximal policy, before the clip.",
        update("importance_weight", "largest", "mean", "least"),
    ),
    Plot(
        "Behaviour weight",
        "Proximal over behaviour policy, before the cap.",
        update("behave_imp_weight", "largest", "mean", "least"),
    ),
    Plot(
        "Clipped tokens",
        "The share of trained tokens at which the clip decides.",
        (Line("share", metric(f"{UPDATE}/clip_ratio")),),
    ),
    Plot("KL, behaviour to target", "How far the update is from what was sampled.", update("kl", "mean")),
    Plot(
        "Error of the approximations",
        "Of the importance weight, against the recomputed proximal policy. Documented range: 0.001 to 0.01.",
        tuple(
            Line(method, metric(f"{APPROXIMATION}/{method}/importance_weight_abs_error/avg"))
            for method in ("loglinear", "linear", "rollout")
        ),
    ),
)
SECONDS = Stack("Seconds of a step", "Where the trainer's time goes.", curves.seconds_by_part)
SPEED = (
    Plot(
        "Tokens a second",
        "Trained, over the whole step, and sampled by the rollout process.",
        (
            Line("trained", quotient("tokens/trained", "time/step")),
            Line("sampled", metric("rollout/tokens_per_s")),
        ),
    ),
    Plot(
        "Model forwards for each trained token",
        "1 where the proximal policy costs none.",
        (Line("forwards", metric("forwards_per_token")),),
    ),
    Plot(
        "Lost groups and samples",
        "Of a step: groups without signal or too stale, and samples that reached the length limit.",
        tuple(
            Line(label, metric(f"rollout/{name}"))
            for label, name in (
                ("filtered groups", "filtered_groups"),
                ("dropped groups", "dropped_groups"),
                ("truncated samples", "truncated"),
            )
        ),
    ),
)
MEMORY = Plot(
    "Memory",
    "GiB at most: of any trainer rank and the rollout process since they started, of a GPU in the step.",
    tuple(
        Line(label, scaled(f"memory/{of}_bytes", GIB))
        for label, of in (("trainer rank", "rank"), ("rollout process", "rollout"), ("GPU", "device"))
    ),
)


def sections(pasts: Sequence[Past]) -> list[dict[str, Any]]:
    """Title and figures of each part of the page, as the page draws them."""
    limit = max(LEAST_POINTS, min(POINTS, MOST_POINTS // max(len(pasts), 1)))
    lines = partial(_lines, pasts, limit)
    stacks = partial(_stacks, pasts, limit)
    found = {
        "Did it learn": [lines(REWARD), _accuracy(pasts, limit), *map(lines, LEARNING)],
        "Staleness": [*stacks(AGES), *map(lines, STALENESS)],
        "Trust region": [*map(lines, TRUST)],
        "Time and throughput": [*stacks(SECONDS), *map(lines, SPEED), lines(MEMORY)],
    }
    kept = {
        title: [figure for figure in figures if figure.get("lines") or figure.get("parts")]
        for title, figures in found.items()
    }
    return [{"title": title, "figures": figures} for title, figures in kept.items() if figures]


def _lines(pasts: Sequence[Past], limit: int, plot: Plot) -> dict[str, Any]:
    drawn: list[dict[str, Any]] = []
    for run, past in enumerate(pasts):
        for role, line in enumerate(plot.lines):
            window = len(past.rows) // SMOOTHED_SHARE if line.smooth else 1
            look = {"run": run, "role": role, "label": line.label, "faint": window > 1}
            drawn.append(look | curves.series(past.rows, line.value, limit))
            if window > 1:
                look |= {"label": f"mean of {window} steps", "faint": False}
                drawn.append(look | curves.smoothed(past.rows, line.value, window, limit))
    return _figure("lines", plot, lines=[one for one in drawn if one["x"]])


def _stacks(pasts: Sequence[Past], limit: int, stack: Stack) -> list[dict[str, Any]]:
    """One of each run. A part has the same colour in all of them: that of its number on a scale up to the largest of
    any run, or of its place in the order of all parts there are."""
    made = [stack.parts(past.rows, limit) for past in pasts]
    labels = dict.fromkeys(part["label"] for one in made for part in one["parts"])
    places = {label: int(label.split()[0]) if stack.ordered else place for place, label in enumerate(labels)}
    scale = {"ordered": stack.ordered, "last": max(places.values(), default=0)}
    for one in made:
        one["parts"] = [part | {"place": places[part["label"]]} for part in one["parts"]]
    return [_figure("stack", stack, run=run, **scale, **one) for run, one in enumerate(made)]


def _accuracy(pasts: Sequence[Past], limit: int) -> dict[str, Any]:
    plot = Plot("Held-out accuracy", "Greedy, of the weights after so many steps; 0 is before the first.", ())
    drawn = [
        {"run": run, "role": 0, "label": "accuracy", "faint": False}
        | curves.drawn(np.array([*past.accuracies]), np.array([*past.accuracies.values()]), limit)
        for run, past in enumerate(pasts)
        if past.accuracies
    ]
    return _figure("lines", plot, lines=drawn)


def _figure(kind: str, drawn: Plot | Stack, **content: Any) -> dict[str, Any]:
    return {"kind": kind, "title": drawn.title, "note": drawn.note, **content}
