"""A run that stands still before one of its steps: so a test acts in the middle of a run, however busy the machine.

    python -m tests.trainer.held STEP megatron_a3po ARGUMENT ...    the production command like that

It goes on once `goes-on` is in its run directory, once it is told to stop, and where it is not the first attempt.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_a3po.__main__ import main
from megatron_a3po.lifetime import StopWish
from megatron_a3po.trainer.batch import Batch
from megatron_a3po.trainer.source import LiveSource, ReplaySource

GOES_ON = "goes-on"


def hold_before(held_step: int, *, deaf: bool = False, always: bool = False) -> Callable[[], None]:
    """What a fork of the command does first (`command.fork`). deaf: it stands still when it is told to stop, too.
    always: and in every attempt."""

    def before() -> None:
        load, wait = ReplaySource._load, LiveSource._wait

        def stand_still(stop: StopWish, run_dir: Path) -> None:
            goes_on = [run_dir / GOES_ON] if always else [run_dir / GOES_ON, run_dir / "attempts" / "2"]
            while not any(file.exists() for file in goes_on) and (deaf or not stop.wished):
                time.sleep(0.02)

        def held_load(self: ReplaySource, step: int) -> Batch:
            if step == held_step:
                stand_still(self.stop, Path(self.config.run_dir))
            return load(self, step)

        def held_wait(self: LiveSource, version: int, timeout_s: float) -> Batch | None:
            if version + 1 == held_step:
                stand_still(self.stop, self.attempt.run_dir)
            return wait(self, version, timeout_s)

        ReplaySource._load, LiveSource._wait = held_load, held_wait

    return before


if __name__ == "__main__":
    hold_before(int(sys.argv[1]))()
    sys.exit(main(sys.argv[3:]))
