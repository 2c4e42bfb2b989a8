"""A run directory that somebody still has is taken over; by a real job after a cut-off node in tests/slurm/."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_a3po.trainer.attempt import Attempt, lock, newest_attempt
from megatron_a3po.trainer.take_over import main


def test_nothing_to_take_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "not there yet")]) == 0
    assert main([str(tmp_path)]) == 0
    assert newest_attempt(tmp_path) == 0
    assert capsys.readouterr().out == ""


def test_whoever_has_it_is_fenced_off_and_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = ExitStack()
    lock(tmp_path, held)
    number = Attempt.take(tmp_path).number

    def stop_when_fenced_off() -> None:
        while newest_attempt(tmp_path) == number:
            time.sleep(0.01)
        held.close()

    holder = threading.Thread(target=stop_when_fenced_off)
    holder.start()
    assert main([str(tmp_path)]) == 0
    holder.join()
    said = capsys.readouterr().out
    assert "where a run is under way (pid " in said
    assert f"attempt {number + 1} fences it off" in said
    assert "it has stopped" in said


def test_whoever_does_not_stop_is_a_matter_for_a_person(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as held:
        lock(tmp_path, held)
        assert main([str(tmp_path), "--within", "0"]) == 3
    assert "it has not stopped within 0 s: end that process, then submit again" in capsys.readouterr().out
