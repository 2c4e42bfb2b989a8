"""Take a run over from an attempt that its job has given up, and that may be alive: on a node that was cut off.

    python -m megatron_a3po.trainer.take_over RUN_DIR [--within SECONDS]

Nothing is to be done where the run directory is free. Where it is not, a number is taken (`attempt.py`), which fences
off whoever has it: it stops within its step, and this waits for it. `slurm/job.sh` calls it when a job runs again; a
second start by mistake is another matter, and is refused as ever.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_a3po.errors import EXIT_DONE, EXIT_NEEDS_PERSON, ConfigError
from megatron_a3po.trainer.attempt import Attempt, lock

WITHIN_S = 900.0  # a step, its checkpoint excepted: that one is not written any more
POLL_S = 0.5


def take_over(run_dir: Path, within_s: float = WITHIN_S) -> int:
    """0 once nobody has the run directory; 3 where somebody keeps it."""
    if (held_by := _holder(run_dir)) is None:
        return EXIT_DONE
    number = Attempt.take(run_dir).number
    _say(
        f"an earlier attempt still runs: {held_by}\nattempt {number} fences it off; it stops within its step"
    )
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if _holder(run_dir) is None:
            _say("it has stopped")
            return EXIT_DONE
        time.sleep(POLL_S)
    _say(f"it has not stopped within {within_s:g} s: end that process, then submit again")
    return EXIT_NEEDS_PERSON


def _holder(run_dir: Path) -> str | None:
    """A sentence of who has the run directory."""
    if not run_dir.is_dir():
        return None
    try:
        with ExitStack() as held:
            lock(run_dir, held)
    except ConfigError as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_a3po.trainer.take_over")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="SECONDS", help="to wait")
    arguments = parser.parse_args(argv)
    return take_over(arguments.run_dir, arguments.within)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
