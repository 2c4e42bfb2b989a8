"""summary.json, and the closing words of a run: what it reached, where its time went, how to load what it made.

Everything that every step recorded is read back from metrics.jsonl, so that a resumed run counts as one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_a3po.errors import InputError
from megatron_a3po.trainer.json_lines import plain
from megatron_a3po.trainer.recording import read_metrics
from megatron_a3po.weights.aside import telling, write_aside

SUMMARY = "summary.json"
TIME = "time/"
# The part of a step that is all of it: the others lie inside.
WHOLE = "step"
WARM_START = "warm_start"


def summarize(
    run_dir: Path,
    *,
    status: str,
    accuracy_before: float | None,
    accuracy_after: float | None,
    export: Path | str | None,
    wall_seconds: float,
    multi_version_fraction: float | None,
    **more: Any,
) -> dict[str, Any]:
    """The summary of a run, as JSON has it. `seconds` has the parts of all its steps and of its warm start;
    `forwards_per_token` is the mean over steps; `more` goes in as it is."""
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    seconds = _seconds(rows)
    if warm := _seconds(read_metrics(run_dir / WARM_START)).get(WHOLE):
        seconds = {WARM_START: warm, **seconds}
    return plain(
        {
            "status": status,
            "steps": rows[-1]["step"] if rows else 0,
            "wall_seconds": wall_seconds,
            "accuracy_before": accuracy_before,
            "accuracy_after": accuracy_after,
            "export": export,
            "forwards_per_token": mean_of(rows, "forwards_per_token"),
            "multi_version_fraction": multi_version_fraction,
            "seconds": seconds,
            **more,
        }
    )


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Written aside and renamed. Errors: OutputError where it cannot be."""
    with telling(run_dir / SUMMARY):
        write_aside(run_dir / SUMMARY, json.dumps(plain(summary), indent=2, allow_nan=False) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """What `write_summary` wrote; None while a run has none. Errors: InputError names a damaged file."""
    path = Path(run_dir) / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not readable as JSON ({error}): remove it.") from None
    known = isinstance(summary, dict) and isinstance(summary.get("status"), str)
    if not known or type(summary.get("steps")) is not int:
        raise InputError(f"{path} is no summary of a run, which has `status` and `steps`: remove it.")
    return summary


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """What a person wants to know when a run has ended."""
    steps = f"{summary['steps']} training step{'' if summary['steps'] == 1 else 's'}"
    lines = [f"{summary['status']}: {steps} in {duration(summary['wall_seconds'])}"]
    lines += _method(summary)
    lines += _accuracy(summary)
    lines += _time(summary)
    if summary["export"] is not None:
        lines += [
            f"export     {summary['export']}",
            "           from transformers import AutoModelForCausalLM",
            f'           model = AutoModelForCausalLM.from_pretrained("{summary["export"]}")',
        ]
    return lines


def duration(seconds: float) -> str:
    """A duration for people: 8.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def mean_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a metric over the rows that have it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def _seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(TIME) and value is not None:
                part = name.removeprefix(TIME)
                seconds[part] = seconds.get(part, 0.0) + value
    return seconds


def _method(summary: dict[str, Any]) -> Iterator[str]:
    if (forwards := summary["forwards_per_token"]) is not None:
        yield f"forwards   {forwards:.4g} for each token"
    if (mixed := summary["multi_version_fraction"]) is not None:
        yield f"responses  {100 * mixed:.0f}% have tokens of several versions"


def _accuracy(summary: dict[str, Any]) -> Iterator[str]:
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    if before is not None and after is not None:
        yield f"accuracy   {before:.3f} before, {after:.3f} after ({after - before:+.3f}), greedy on held-out prompts"
    elif before is not None or after is not None:
        when, value = ("before", before) if after is None else ("after", after)
        yield f"accuracy   {value:.3f} {when}, greedy on held-out prompts"


def _time(summary: dict[str, Any]) -> Iterator[str]:
    """The parts, largest first, then what they leave of the steps and what lies outside of them."""
    parts = dict(summary["seconds"])
    whole, warm = parts.pop(WHOLE, None), parts.pop(WARM_START, 0.0)
    inside = sum(parts.values())
    steps = inside if whole is None else whole
    shown = [("warm start", warm)] if warm else []
    shown += sorted(
        ((part.replace("_", " "), value) for part, value in parts.items()), key=lambda item: -item[1]
    )
    shown += [
        ("rest of the steps", steps - inside),
        ("outside of steps", summary["wall_seconds"] - steps - warm),
    ]
    total = max(summary["wall_seconds"], steps + warm)
    head = "time"
    for part, value in shown:
        # A rest may fall below zero by rounding, or because the wall clock is of the last attempt only.
        if total > 0 and value / total >= 0.001:
            yield f"{head:<11}{part:<22}{value:9.1f} s {100 * value / total:4.0f}%"
            head = ""
