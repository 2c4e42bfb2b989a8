"""The experiment's plots, as PNG files: curves over steps with their spread over seeds, and what depends on staleness.

Drawn with matplotlib, which only development needs. The same numbers are in the tables of `reproduce_tables.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from reproduce_cells import COMPARED
from reproduce_results import (
    ANCHORS,
    MEANS,
    PARTS,
    PUBLISHED,
    PUBLISHED_STALENESS,
    Row,
    Setting,
    mean_and_spread,
    over_seeds,
)

from megatron_a3po.trainer.recording import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

COLOURS = {"loglinear": "C0", "linear": "C2", "recompute": "C1", "coupled": "C3", "rollout": "C7"}
SMOOTHED_STEPS = 5
FEW_STEPS = 20
CURVES = {
    "task reward": "reward/avg",
    "largest importance weight": MEANS["importance_weight_max"],
    "clipped tokens": MEANS["clipped_tokens"],
    "entropy": "ppo_actor/update/entropy/avg",
}


def draw(rows: Sequence[Row], cells: Path, folder: Path) -> list[Path]:
    """Every plot there are rows for; their files."""
    settings = over_seeds(rows)
    files = []
    compared = {key: found for key, found in settings.items() if not key.gain and key.method in COLOURS}
    for m in sorted({key.mini_batches for key in compared}):
        of_m = {key: found for key, found in compared.items() if key.mini_batches == m}
        files.append(_curves(of_m, cells, folder / f"curves-m{m}.png"))
        files.append(_time(of_m, folder / f"time-m{m}.png"))
    if errors := {key: found for key, found in settings.items() if key.method == "metrics"}:
        files.append(_errors(errors, folder / "errors.png"))
    if gain := {key: found for key, found in settings.items() if key.gain}:
        files.append(_gain(gain, folder / "gain.png"))
    return files


def _curves(settings: dict[Setting, list[Row]], cells: Path, path: Path) -> Path:
    """A row of panels for each quantity, a column for each staleness; a line a method, its range over seeds shaded. The
    published largest importance weights are dotted."""
    ages = sorted({(key.mode != "fixed", key.staleness) for key in settings})
    figure, axes = pyplot.subplots(
        len(CURVES), len(ages), figsize=(4 * len(ages), 2.4 * len(CURVES)), sharey="row", squeeze=False
    )
    for column, (free, staleness) in enumerate(ages):
        axes[0][column].set_title(f"{'bound' if free else 'staleness'} {staleness}", fontsize=9)
        shown = {
            key: [read_metrics(cells / row["name"]) for row in found]
            for key, found in sorted(settings.items(), key=lambda item: COMPARED.index(item[0].method))
            if (key.mode != "fixed", key.staleness) == (free, staleness)
        }
        for axis, (title, metric) in zip(axes[:, column], CURVES.items(), strict=True):
            for key, runs in shown.items():
                _line(axis, runs, metric, COLOURS[key.method], key.method)
            if metric == MEANS["importance_weight_max"]:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(ScalarFormatter())
                axis.yaxis.set_minor_formatter(NullFormatter())
                for method in ("loglinear", "recompute") if staleness == PUBLISHED_STALENESS else ():
                    level = PUBLISHED[method]["importance_weight_max"]
                    axis.axhline(level, color=COLOURS[method], linewidth=0.7, linestyle=":")
            axis.tick_params(labelsize=7)
            if column == 0:
                axis.set_ylabel(title, fontsize=8)
    axes[0][0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    return _saved(figure, path)


def _line(axis: Any, runs: list[list[Row]], metric: str, colour: str, label: str) -> None:
    """The mean of several runs, smoothed over a few steps, and the range of them."""
    length = min(len(run) for run in runs)
    values = np.array([[row.get(metric, np.nan) for row in run[:length]] for run in runs], dtype=float)
    window = max(1, min(SMOOTHED_STEPS, length // 10))
    # A step without a value, such as one before whose batch nothing was scored, leaves the others their mean.
    windows = np.lib.stride_tricks.sliding_window_view(values, window, axis=1)
    smooth = np.ma.masked_invalid(windows).mean(axis=2).filled(np.nan)
    steps = np.arange(window, length + 1)
    axis.plot(
        steps,
        smooth.mean(0),
        color=colour,
        linewidth=1.2,
        label=label,
        marker="." if length < FEW_STEPS else "",
    )
    if len(runs) > 1:
        axis.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.15, linewidth=0)


def _time(settings: dict[Setting, list[Row]], path: Path) -> Path:
    """A bar for each method and staleness: the parts of a step, medians over steps, means over seeds."""
    keys = sorted(
        settings, key=lambda key: (key.mode, key.staleness, COMPARED.index(key.method)), reverse=True
    )
    figure, axis = pyplot.subplots(figsize=(7, 0.3 * len(keys) + 1))
    names = [
        f"{key.method}, {'staleness' if key.mode == 'fixed' else 'bound'} {key.staleness}" for key in keys
    ]
    ends = np.zeros(len(keys))
    for part in PARTS:
        found = [mean_and_spread(settings[key], f"{part}_s") for key in keys]
        seconds = np.array([value[0] if value else 0.0 for value in found])
        axis.barh(names, seconds, left=ends, label=part.replace("_", " "))
        ends += seconds
    axis.set_xlabel("seconds of a step", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=len(PARTS))
    return _saved(figure, path)


def _errors(settings: dict[Setting, list[Row]], path: Path) -> Path:
    batches = sorted({key.mini_batches for key in settings})
    figure, axes = pyplot.subplots(2, len(batches), figsize=(5 * len(batches), 5), squeeze=False)
    for column, m in enumerate(batches):
        keys = sorted((key for key in settings if key.mini_batches == m), key=lambda key: key.staleness)
        for axis, error in zip(axes[:, column], ("abs_error", "importance_weight_abs_error"), strict=True):
            for anchor in ANCHORS:
                found = [mean_and_spread(settings[key], f"{anchor}/{error}") for key in keys]
                points = [(key.staleness, value[0]) for key, value in zip(keys, found, strict=True) if value]
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[anchor], label=anchor, linewidth=1)
            axis.set_title(f"{error.replace('_', ' ')}, {m} mini-batches", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("staleness", fontsize=8)
    axes[0][0].legend(fontsize=7)
    return _saved(figure, path)


def _gain(settings: dict[Setting, list[Row]], path: Path) -> Path:
    """Wall time and idle shares by bound, a line a policy; the synchronous run is bound 0 of each."""
    quantities = {
        "samples_s": "seconds for the same samples",
        "trainer_idle": "trainer idle",
        "generator_idle": "generator idle",
        "staleness_avg": "mean staleness",
    }
    figure, axes = pyplot.subplots(1, len(quantities), figsize=(3.2 * len(quantities), 2.8))
    policies = sorted({key.policy for key in settings}, reverse=True)
    for axis, (name, title) in zip(axes, quantities.items(), strict=True):
        for policy in policies:
            keys = sorted(
                (key for key in settings if key.staleness == 0 or key.policy == policy),
                key=lambda key: key.staleness,
            )
            means = [mean_and_spread(settings[key], name) for key in keys]
            points = [(key.staleness, mean[0]) for key, mean in zip(keys, means, strict=True) if mean]
            axis.plot(*zip(*points, strict=True), "o-", label=policy, linewidth=1, markersize=3)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("bound (0: synchronous)", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
