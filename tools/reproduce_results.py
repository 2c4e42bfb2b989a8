"""What the experiment reports of a cell, read from its metrics.jsonl and summary.json, and over seeds.

A final figure is a mean over the last steps; the others are means over the steps whose samples are as stale as the cell
says, seconds their medians, since a machine may have other work. `PUBLISHED` are the figures of the A-3PO
publication, on another model and task. How they are shown is in `reproduce_tables.py` and `reproduce_plots.py`.
"""

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reproduce_cells import Cell, found_cells

from megatron_a3po.metric_names import APPROXIMATION, UPDATE
from megatron_a3po.trainer.recording import read_metrics
from megatron_a3po.trainer.summary import mean_of, read_summary

LAST_STEPS = 10
ANCHORS = ("loglinear", "linear", "rollout")
ERRORS = ("abs_error", "rel_error", "importance_weight_abs_error", "behave_imp_weight_abs_error")
PARTS = ("wait_for_samples", "proximal_pass", "forward_backward", "optimizer")
Row = dict[str, Any]

FINAL = {"reward": "reward/avg", "entropy": f"{UPDATE}/entropy/avg"}
MEANS = {
    "importance_weight_max": f"{UPDATE}/importance_weight/max",
    "importance_weight_min": f"{UPDATE}/importance_weight/min",
    "importance_weight_avg": f"{UPDATE}/importance_weight/avg",
    "behave_imp_weight_max": f"{UPDATE}/behave_imp_weight/max",
    "behave_imp_weight_min": f"{UPDATE}/behave_imp_weight/min",
    "behave_imp_weight_avg": f"{UPDATE}/behave_imp_weight/avg",
    "clipped_tokens": f"{UPDATE}/clipped_tokens",
    "clip_ratio": f"{UPDATE}/clip_ratio",
    "kl": f"{UPDATE}/kl/avg",
    "grad_norm": "grad_norm",
    "forwards_per_token": "forwards_per_token",
    "sampler_trainer": "sampler_trainer/abs_diff/avg",
    "staleness_avg": "staleness/avg",
    "tokens": "tokens/trained",
}

# Qwen2.5-1.5B-Instruct, GSM8K, 300 steps, staleness 8, batch 256 x 4, 4 mini-batches, 1,024 response tokens. Their
# recompute passes over every token, as `forced` does here.
PUBLISHED_STALENESS = 8
PUBLISHED: dict[str, Row] = {
    "loglinear": {
        "minutes": 163,
        "reward": 0.937,
        "accuracy": 0.799,
        "importance_weight_max": 2.20,
        "importance_weight_min": 0.35,
        "clipped_tokens": 31.6,
        "entropy": 0.084,
        "proximal_pass_s": 0.0012,
    },
    "linear": {"minutes": 163, "reward": 0.944, "accuracy": 0.796},
    "recompute": {
        "minutes": 207,
        "reward": 0.954,
        "accuracy": 0.795,
        "importance_weight_max": 3.69,
        "importance_weight_min": 0.26,
        "clipped_tokens": 194.5,
        "entropy": 0.070,
        "proximal_pass_s": 10,
    },
}


@dataclass(frozen=True)
class Setting:
    """What the seeds of a comparison share."""

    method: str
    mode: str
    staleness: int
    mini_batches: int
    policy: str
    gain: bool

    @classmethod
    def of(cls, cell: Cell) -> "Setting":
        return cls(cell.method, cell.mode, cell.staleness, cell.mini_batches, cell.policy, cell.gain)


def read_results(out: Path) -> list[Row]:
    """A row for each finished cell under a folder."""
    return [{**asdict(cell), **figures(cell, directory)} for cell, directory in found_cells(out)]


def figures(cell: Cell, run_dir: Path) -> Row:
    """The numbers of one run; None where it has none."""
    rows = read_metrics(run_dir)
    summary = read_summary(run_dir)
    assert summary is not None, run_dir
    stale = [row for row in rows if row["step"] > cell.staleness] or rows
    # The first step of a run waits for the generator to start.
    measured = rows[1:] or rows if cell.gain else stale
    times = {f"{part}_s": median_of(stale, f"time/{part}") for part in ("step", *PARTS)}
    whole = sum(row.get("time/step") or 0.0 for row in measured)
    return {
        "name": cell.name,
        "minutes": summary["wall_seconds"] / 60,
        "accuracy_before": summary["accuracy_before"],
        "accuracy": summary["accuracy_after"],
        **{name: mean_of(rows[-LAST_STEPS:], metric) for name, metric in FINAL.items()},
        **{name: mean_of(measured, metric) for name, metric in MEANS.items()},
        "importance_weight_largest": most(measured, MEANS["importance_weight_max"]),
        "staleness_max": most(measured, "staleness/max"),
        "peak_mb": max(row.get("memory/rank_bytes") or 0.0 for row in rows) / 2**20 or None,
        "dropped_groups": sum(row.get("rollout/dropped_groups") or 0 for row in measured),
        "samples_s": whole,
        "trainer_idle": _share(measured, "time/wait_for_samples", whole),
        "generator_idle": _share(measured, "rollout/idle_s", whole),
        **times,
        **approximation_errors(stale),
    }


def _share(rows: list[Row], name: str, whole: float) -> float | None:
    return sum(row.get(name) or 0.0 for row in rows) / whole if whole else None


def approximation_errors(rows: list[Row]) -> Row:
    """Of a run with actor.prox_logp_method=metrics: `<anchor>/<error>`, against the recomputed log-probs."""
    names = [f"{anchor}/{error}" for anchor in ANCHORS for error in ERRORS]
    found = {name: mean_of(rows, f"{APPROXIMATION}/{name}/avg") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def over_seeds(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """The rows of each setting, one a seed."""
    settings: dict[Setting, list[Row]] = {}
    for row in rows:
        cell = Cell(**{key: row[key] for key in Cell.__dataclass_fields__ if key in row})
        settings.setdefault(Setting.of(cell), []).append(row)
    return settings


def mean_and_spread(rows: Iterable[Row], name: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds; 0 for a single one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def most(rows: list[Row], name: str) -> float | None:
    """The largest of a metric; a number that was not finite is none."""
    return max((row[name] for row in rows if row.get(name) is not None), default=None)


def median_of(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None


def program_rows(rows: Iterable[Row]) -> list[Row]:
    """As the benchmarks write them: a row for each setting, `ratio` being the time of a step to loglinear's."""
    steps: dict[str, dict[str, list[Row]]] = {}
    for key, found in over_seeds(rows).items():
        age = f"{'staleness' if key.mode == 'fixed' else f'{key.policy}, bound'} {key.staleness}"
        case = f"{'gain, ' if key.gain else ''}{key.mini_batches} mini-batches, {age}"
        steps.setdefault(case, {})[key.method] = found
    table = []
    for case, methods in steps.items():
        means = {method: mean_and_spread(found, "step_s") for method, found in methods.items()}
        seconds = {method: None if mean is None else mean[0] for method, mean in means.items()}
        base = seconds.get("loglinear")
        for method, found in methods.items():
            taken = seconds[method]
            ratio = None if base is None or taken is None else taken / base
            peak = max((row["peak_mb"] for row in found if row.get("peak_mb")), default=None)
            row = {"case": case, "implementation": method, "seconds": seconds[method], "ratio": ratio}
            table.append({**row, "peak_mb": peak})
    return table


def write_rows(rows: list[Row], json_file: Path, csv_file: Path) -> None:
    """For programs: a row a cell."""
    json_file.write_text(json.dumps(rows, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    with csv_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
