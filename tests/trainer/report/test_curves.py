"""Thinning keeps what a person looks for; gaps stay gaps; stacks add up."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.trainer.report.curves import (
    metric,
    quotient,
    seconds_by_part,
    series,
    shares_by_staleness,
    smoothed,
    thinned,
)

numbers = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(numbers, max_size=300), st.integers(3, 60))
def test_thinning_keeps_the_ends_the_extremes_and_that_there_was_a_gap(values: list[float], limit: int):
    points = np.array(values, np.float64)
    kept = thinned(points, limit)
    assert len(kept) <= max(limit, 5)  # two ends and one bucket's three
    assert (np.diff(kept) > 0).all()
    finite = points[np.isfinite(points)]
    if len(points):
        assert {0, len(points) - 1} <= set(kept.tolist())
    if len(finite):
        shown = points[kept][np.isfinite(points[kept])]
        assert (shown.min(), shown.max()) == (finite.min(), finite.max())
    assert np.isfinite(points).all() == np.isfinite(points[kept]).all()


def test_every_bucket_keeps_its_spike():
    values = np.zeros(10_000)
    spikes = np.arange(7, 10_000, 100)
    values[spikes] = 1.0
    kept = thinned(values, 1000)
    assert len(kept) <= 1000
    assert set(spikes) <= set(kept.tolist())


def test_a_null_is_a_gap_and_an_absent_metric_no_point():
    rows = [
        {"step": 1, "a": 1},
        {"step": 2, "a": None},
        {"step": 3},
        {"step": 4, "a": math.nan},
        {"step": 5, "a": 0.123456},
    ]
    assert series(rows, metric("a")) == {"x": [1, 2, 4, 5], "y": [1.0, None, None, 0.12346]}
    assert series(rows, metric("b")) == {"x": [], "y": []}
    assert series([{"step": 1, "a": 6.0, "b": 2}, {"step": 2, "a": 1.0, "b": 0}], quotient("a", "b"))[
        "y"
    ] == [3.0, None]


@pytest.mark.parametrize(
    ("window", "expected"), [(1, [1.0, 2.0, 6.0]), (2, [1.0, 1.5, 4.0]), (9, [1.0, 1.5, 3.0])]
)
def test_a_moving_mean_passes_over_what_is_no_number(window: int, expected: list[float]):
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3, "a": 2.0}, {"step": 4, "a": 6.0}]
    assert smoothed(rows, metric("a"), window) == {"x": [1, 3, 4], "y": expected}


def test_the_parts_of_a_step_and_what_they_leave():
    rows = [
        {"step": 1, "time/step": 10.0, "time/forward_backward": 6.0, "time/publish": 1.0},
        {
            "step": 2,
            "time/step": 5.0,
            "time/forward_backward": 4.0,
            "time/checkpoint": 1.5,
        },  # the clocks overlap
        {"step": 3, "time/step": None, "time/forward_backward": 1.0},
    ]
    assert seconds_by_part(rows) == {
        "x": [1, 2],
        "parts": [
            {"label": "forward backward", "y": [6.0, 4.0]},
            {"label": "checkpoint", "y": [0.0, 1.5]},
            {"label": "publish", "y": [1.0, 0.0]},
            {"label": "rest", "y": [3.0, 0.0]},
        ],
    }


def test_shares_of_staleness_and_the_oldest_together():
    rows = [
        {"step": 1, "staleness/histogram": {"0": 3, "2": 1}},
        {"step": 2},
        {"step": 3, "staleness/histogram": {"10": 2}},
    ]
    assert shares_by_staleness(rows) == {
        "x": [1, 3],
        "parts": [
            {"label": "0", "y": [0.75, 0.0]},
            {"label": "2", "y": [0.25, 0.0]},
            {"label": "10", "y": [0.0, 1.0]},
        ],
    }
    many = shares_by_staleness([{"step": 1, "staleness/histogram": {str(age): 1 for age in range(20)}}])
    assert [part["label"] for part in many["parts"]] == [*map(str, range(11)), "11 and more"]
    assert many["parts"][-1]["y"] == [0.45]
    assert sum(part["y"][0] for part in many["parts"]) == pytest.approx(1)
