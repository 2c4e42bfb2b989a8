"""The generator's idle time, by a clock that moves by hand."""

import pytest

from megatron_a3po.rollout import statistics
from megatron_a3po.rollout.statistics import IdleTime


def test_idle_is_the_time_without_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(statistics.time, "monotonic", lambda: now)
    idle = IdleTime()
    now = 2.0
    with idle.interrupted():
        now = 5.0
        with idle.interrupted():  # two overlap
            now = 6.0
        now = 9.0
        assert idle.take() == 2.0
        now = 10.0
    now = 11.0
    assert idle.take() == 1.0
    now = 11.5
    assert idle.take() == 0.5  # nobody asked in between
    assert idle.take() == 0.0
