"""Some of the trajectories of samples.jsonl, spread over the run, as the page shows them.

The file of a long run is large: only the lines that are shown are parsed.
"""

import json
from pathlib import Path
from typing import Any

from megatron_a3po.trainer.recording import SAMPLES

SHOWN = 40  # over all runs
MOST_TOKENS = 1500
TOKEN_FIELDS = ("texts", "versions", "behave_logp", "logp", "importance_weight", "clipped")
DIGITS = 4
NUMBERS = {int, float, bool, type(None)}


def samples(run_dirs: list[Path]) -> list[dict[str, Any]]:
    """By run and step; the last ones of a run are always among them."""
    limit = max(SHOWN // max(len(run_dirs), 1), 1)
    return [
        {"run": run, **row}
        for run, run_dir in enumerate(run_dirs)
        for row in _of_run(run_dir / SAMPLES, limit)
    ]


def _of_run(file: Path, limit: int) -> list[dict[str, Any]]:
    places = _line_starts(file)
    if len(places) > limit:
        places = [
            places[-1 - index * (len(places) - 1) // max(limit - 1, 1)] for index in reversed(range(limit))
        ]
    shown = []
    for place in places:
        with file.open("rb") as lines:
            lines.seek(place)
            row = _parsed(lines.readline())
        if row is not None:
            shown.append(_short(row))
    return sorted(shown, key=lambda row: row["step"])


def _line_starts(file: Path) -> list[int]:
    if not file.is_file():
        return []
    starts, place = [], 0
    with file.open("rb") as lines:
        for line in lines:
            starts.append(place)
            place += len(line)
    return starts


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a torn line, and for one that is no trajectory."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)  # NaN has no JSON form
    except ValueError:
        return None
    return row if isinstance(row, dict) and _is_trajectory(row) else None


def _is_trajectory(row: dict[str, Any]) -> bool:
    """Whether the page can show it: lists of the right kind, absent ones aside."""
    kinds = dict.fromkeys(TOKEN_FIELDS, NUMBERS) | {"texts": {str}, "versions": {int}}
    return (
        type(row.get("step")) is int
        and isinstance(row.get("response"), str)
        and type(row.get("reward")) in NUMBERS
        and type(row.get("current_version")) in NUMBERS
        and all(
            isinstance(row.get(name) or [], list) and set(map(type, row.get(name) or [])) <= kind
            for name, kind in kinds.items()
        )
    )


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the page: the tokens of the response only, and not all of a very long one's."""
    versions = row.get("versions") or []
    first = next((place for place, version in enumerate(versions) if version >= 0), len(versions))
    kept = {
        name: row.get(name)
        for name in ("step", "current_version", "prompt", "response", "reward", "finish_reason")
    }
    kept["num_tokens"] = len(versions) - first
    if row.get("texts"):
        for name in TOKEN_FIELDS:
            kept[name] = [_rounded(value) for value in (row.get(name) or [])[first : first + MOST_TOKENS]]
    return kept


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
