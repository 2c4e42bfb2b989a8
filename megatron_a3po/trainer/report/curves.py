"""From rows to what the page draws: series of at most `limit` points that keep every bucket's extremes.

A point that is drawn was recorded: buckets are never averaged, so a spike of one step in ten thousand is still there,
and a step whose number is not finite leaves a gap. Which plots there are is `plots`' business.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
# None: the row has no such number; NaN: it has one that is none.
Value = Callable[[Row], float | None]
Floats = NDArray[np.float64]

POINTS = 1000
DIGITS = 5
TIME = "time/"
WHOLE = "time/step"
HISTOGRAM = "staleness/histogram"
REST = "rest"
MOST_STALENESSES = 12


def metric(name: str) -> Value:
    """The metric itself."""

    def value(row: Row) -> float | None:
        if name not in row:
            return None
        found = row[name]
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if is_number else math.nan

    return value


def quotient(above: str, below: str) -> Value:
    """Of two metrics; a gap where the second is 0."""

    def value(row: Row) -> float | None:
        one, other = metric(above)(row), metric(below)(row)
        return None if one is None or other is None else one / other if other else math.nan

    return value


def scaled(name: str, factor: float) -> Value:
    """A metric in another unit."""

    def value(row: Row) -> float | None:
        found = metric(name)(row)
        return None if found is None else found * factor

    return value


def series(rows: Sequence[Row], value: Value, limit: int = POINTS) -> dict[str, list[Any]]:
    """{"x": steps, "y": values} of the rows that have it."""
    found = [(row["step"], number) for row in rows if (number := value(row)) is not None]
    steps, values = (
        np.array([step for step, _ in found], np.int64),
        np.array([v for _, v in found], np.float64),
    )
    return drawn(steps, values, limit)


def smoothed(rows: Sequence[Row], value: Value, window: int, limit: int = POINTS) -> dict[str, list[Any]]:
    """The mean of each value and the `window` - 1 before it."""
    found = [(row["step"], n) for row in rows if (n := value(row)) is not None and math.isfinite(n)]
    sums = np.cumsum([0.0, *(n for _, n in found)])
    ends = np.arange(1, len(found) + 1)
    starts = np.maximum(ends - window, 0)
    return drawn(
        np.array([s for s, _ in found], np.int64), (sums[ends] - sums[starts]) / (ends - starts), limit
    )


def drawn(steps: NDArray[np.int64], values: Floats, limit: int) -> dict[str, list[Any]]:
    """The points of a curve as the page has them, thinned."""
    kept = thinned(values, limit)
    return {"x": steps[kept].tolist(), "y": [short(value) for value in values[kept].tolist()]}


def thinned(values: Floats, limit: int) -> NDArray[np.int64]:
    """The indices of at most `limit` points: first and last, and of each bucket the least, the largest and, where
    there are any, the first that is not finite."""
    if len(values) <= limit:
        return np.arange(len(values))
    finite = np.isfinite(values)
    num_buckets = max((limit - 2) // (2 if finite.all() else 3), 1)
    kept = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), num_buckets):
        fine = bucket[finite[bucket]]
        if len(fine):
            kept |= {int(fine[values[fine].argmin()]), int(fine[values[fine].argmax()])}
        if len(fine) < len(bucket):
            kept.add(int(bucket[~finite[bucket]][0]))
    return np.array(sorted(kept), np.int64)


def short(value: float) -> float | None:
    """A number as a person needs it; null where it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def seconds_by_part(rows: Sequence[Row], limit: int = POINTS) -> dict[str, Any]:
    """A stack: the parts of each step's time, largest first, and what they leave of it."""
    rows = [row for row in rows if (metric(WHOLE)(row) or 0) > 0]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(TIME) and name != WHOLE)
    whole = np.array([metric(WHOLE)(row) for row in rows], np.float64)
    parts = {name.removeprefix(TIME).replace("_", " "): _column(rows, name) for name in names}
    parts = dict(sorted(parts.items(), key=lambda part: -part[1].sum()))
    # A clock started later than another may leave a rest below zero.
    if parts:
        parts[REST] = np.maximum(whole - sum(parts.values(), np.zeros_like(whole)), 0.0)
    return _stack(rows, parts, whole, limit)


def shares_by_staleness(rows: Sequence[Row], limit: int = POINTS) -> dict[str, Any]:
    """A stack: the share of trained tokens of each staleness, freshest first; the oldest ones together."""
    name = HISTOGRAM
    rows = [row for row in rows if row.get(name)]
    found = sorted({int(age) for row in rows for age in row[name]})
    last = found[MOST_STALENESSES - 1] if len(found) > MOST_STALENESSES else math.inf
    parts: dict[str, Floats] = {}
    for age in found:
        label = str(age) if age < last else f"{last} and more"
        share = np.array([row[name].get(str(age), 0) / sum(row[name].values()) for row in rows])
        parts[label] = parts.get(label, np.zeros(len(rows))) + share
    stalest = np.array([max(map(int, row[name])) for row in rows], np.float64)
    return _stack(rows, parts, stalest, limit)


def _column(rows: Sequence[Row], name: str) -> Floats:
    values = np.array([metric(name)(row) or 0.0 for row in rows], np.float64)
    return np.where(np.isfinite(values), values, 0.0)


def _stack(rows: Sequence[Row], parts: dict[str, Floats], thinned_by: Floats, limit: int) -> dict[str, Any]:
    """Every part at the same steps: those that keep the extremes of `thinned_by`."""
    kept = thinned(thinned_by, limit)
    return {
        "x": [rows[index]["step"] for index in kept.tolist()],
        "parts": [
            {"label": label, "y": [short(value) for value in values[kept].tolist()]}
            for label, values in parts.items()
        ],
    }
