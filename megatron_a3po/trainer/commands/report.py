"""`report RUN_DIR ...`: what runs did, side by side, from their summaries, metrics and configurations.

Crashed and unfinished runs have a column like all others, of what they recorded. Imports no torch.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from megatron_a3po.config.difference import flat
from megatron_a3po.errors import EXIT_DONE, InputError
from megatron_a3po.trainer.recording import METRICS, read_metrics
from megatron_a3po.trainer.summary import SUMMARY, duration, mean_of, read_summary

NOTHING = "-"
EDGE_STEPS = 10  # the first and the last few steps, whose rewards are compared
PIPE_WIDTH = 240


@dataclass(frozen=True)
class Past:
    """What a run directory holds of its run."""

    directory: Path
    config: dict[str, Any]  # dotted key -> value
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    directories = [Path(name) for name in arguments.run_dirs]
    if problems := [_no_run(directory) for directory in directories if not is_run(directory)]:
        raise InputError(problems)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(comparison([read_past(directory) for directory in directories]))
    return EXIT_DONE


def is_run(directory: Path) -> bool:
    """A run that died early has a configuration and logs; a folder with only a configuration is none."""
    recorded = any((directory / name).is_file() for name in (METRICS, SUMMARY))
    return recorded or ((directory / "config.yaml").is_file() and (directory / "logs").is_dir())


def read_past(directory: Path) -> Past:
    """Errors: InputError names a file that is damaged."""
    file = directory / "config.yaml"
    try:
        config = flat(OmegaConf.to_container(OmegaConf.load(file), resolve=False)) if file.is_file() else {}
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file} is not readable: {str(error).splitlines()[0]}.") from None
    return Past(directory, config, read_metrics(directory), read_summary(directory))


def comparison(pasts: list[Past]) -> Table:
    """A column for each run; below what they did, the keys in which they were configured differently."""
    table = Table()
    table.add_column("run", no_wrap=True)
    for past in pasts:
        table.add_column(str(past.directory), overflow="fold")
    columns = [figures(past) for past in pasts]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    table.add_section()
    for key in dict.fromkeys(key for past in pasts for key in past.config):
        values = [str(past.config.get(key, NOTHING)) for past in pasts]
        if key != "run_dir" and len(set(values)) > 1:
            table.add_row(key, *values)
    return table


def figures(past: Past) -> dict[str, str]:
    """Label -> text of one run."""
    rows, summary = past.rows, past.summary or {}
    before, after = _accuracies(past)
    gain = None if before is None or after is None else after - before
    seconds, waited = mean_of(rows, "time/step"), mean_of(rows, "time/wait_for_samples")
    tokens = mean_of(rows, "tokens/trained")
    stalest = [row["staleness/max"] for row in rows if row.get("staleness/max") is not None]
    multi_version = summary.get("multi_version_fraction", mean_of(rows, "rollout/multi_version_fraction"))
    return {
        "status": _status(past),
        "starts": str(rows[-1].get("attempt", NOTHING)) if rows else NOTHING,
        "wall time": NOTHING if "wall_seconds" not in summary else duration(summary["wall_seconds"]),
        "accuracy, before": _number(before, ".3f"),
        "accuracy, latest": _number(after, ".3f"),
        "gain": _number(gain, "+.3f"),
        f"reward, first {EDGE_STEPS} steps": _number(mean_of(rows[:EDGE_STEPS], "reward/avg"), ".3f"),
        f"reward, last {EDGE_STEPS} steps": _number(mean_of(rows[-EDGE_STEPS:], "reward/avg"), ".3f"),
        "staleness, mean": _number(mean_of(rows, "staleness/avg"), ".2f"),
        "staleness, largest": _number(max(stalest, default=None), ".0f"),
        "of several versions": _number(multi_version, ".0%"),
        "forwards per token": _number(mean_of(rows, "forwards_per_token"), ".4g"),
        "updates skipped": _number(sum(row.get("steps_skipped") or 0 for row in rows), ".0f"),
        "seconds per step": _number(seconds, ".3g"),
        "trained tokens/s": _number(tokens / seconds if tokens and seconds else None, ",.0f"),
        "waiting for samples": _number(waited / seconds if waited is not None and seconds else None, ".0%"),
    }


def _accuracies(past: Past) -> tuple[float | None, float | None]:
    """Before the first step, and the latest: after the last step, or where a run has got to."""
    if past.summary is not None:
        return past.summary.get("accuracy_before"), past.summary.get("accuracy_after")
    found = {
        row["evaluation/version"]: row.get("evaluation/accuracy")
        for row in past.rows
        if "evaluation/version" in row
    }
    latest = max(found, default=0)
    return found.get(0), found[latest] if latest > 0 else None


def _status(past: Past) -> str:
    if past.summary is not None:
        return f"{past.summary['status']}, {past.summary['steps']} steps"
    reached, planned = past.rows[-1]["step"] if past.rows else 0, past.config.get("trainer.steps", "?")
    return f"unfinished, step {reached} of {planned}"


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"


def _no_run(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a folder: give the directory of a run."
    return (
        f"{directory} is no run, it has no {METRICS}, no {SUMMARY} and no logs: give the directory of a run."
    )
