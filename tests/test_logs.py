"""Logging in a process of its own: who speaks, what every record holds, where the end of a process is found."""

import subprocess
import sys
from pathlib import Path

PROLOGUE = """
import logging, sys, warnings
from megatron_a3po.logs import set_up_logs
log = logging.getLogger("megatron_a3po.trainer.loop")
"""


def run(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", PROLOGUE + code, str(tmp_path)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def log_of(tmp_path: Path, process_name: str) -> str:
    return (tmp_path / "logs" / f"{process_name}.log").read_text()


def test_rank_and_step_are_in_every_record(tmp_path: Path):
    code = "step = set_up_logs(sys.argv[1], 'rank-0', speaks=True); log.info('a'); step.step = 7; log.warning('b')"
    done = run(tmp_path, code)
    first, second = log_of(tmp_path, "rank-0").splitlines()
    assert "rank-0 step - INFO megatron_a3po.trainer.loop: a" in first
    assert "rank-0 step 7 WARNING megatron_a3po.trainer.loop: b" in second
    assert done.stderr.splitlines()[0].endswith(" a")
    assert done.stderr.splitlines()[1].endswith("WARNING (rank-0, step 7): b")


def test_only_one_speaks(tmp_path: Path):
    done = run(tmp_path, "set_up_logs(sys.argv[1], 'rank-1', speaks=False); log.warning('b')")
    assert done.stderr == ""
    assert "rank-1" in log_of(tmp_path, "rank-1")


def test_other_libraries_are_heard_from_warning_up(tmp_path: Path):
    code = "set_up_logs(sys.argv[1], 'rank-0', speaks=False); other = logging.getLogger('other')\n"
    run(tmp_path, code + "other.info('quiet'); other.warning('loud'); warnings.warn('said')")
    text = log_of(tmp_path, "rank-0")
    assert "quiet" not in text
    assert "loud" in text
    assert "said" in text


def test_the_last_lines_say_what_went_wrong(tmp_path: Path):
    done = run(tmp_path, "set_up_logs(sys.argv[1], 'rank-1', speaks=False); {}['gone']")
    assert log_of(tmp_path, "rank-1").splitlines()[-1] == "KeyError: 'gone'"
    assert done.stderr.splitlines()[-1] == "KeyError: 'gone'"
    done = run(tmp_path, "set_up_logs(sys.argv[1], 'rank-2', speaks=True); {}['gone']")
    assert done.stderr.count("Traceback") == 1


def test_a_fatal_signal_leaves_its_stack(tmp_path: Path):
    run(tmp_path, "import os; set_up_logs(sys.argv[1], 'rank-1', speaks=False); os.abort()")
    assert "Fatal Python error: Aborted" in log_of(tmp_path, "rank-1")


def test_a_forked_process_takes_its_own_name_and_a_resumed_one_appends(tmp_path: Path):
    code = "for name in ('main', 'rank-0'): set_up_logs(sys.argv[1], name, speaks=True)\nlog.info('a')"
    assert len(run(tmp_path, code).stderr.splitlines()) == 1
    run(tmp_path, code)
    assert log_of(tmp_path, "main") == ""
    assert len(log_of(tmp_path, "rank-0").splitlines()) == 2
