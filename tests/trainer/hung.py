"""A rank that stands still for good before one of its steps, as a wedged machine would leave it: stopped by SIGSTOP.

    python -m tests.trainer.hung RANK STEP megatron_a3po ARGUMENT ...    the production command like that

Steps count from this start.
"""

import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from megatron_a3po.__main__ import main
from megatron_a3po.trainer import loop


def hang(rank: int, step: int) -> None:
    """Replace what every rank does first in a step."""
    align, passed = loop.align, []

    def stopped(batch: Any, *sections: Any) -> Any:
        passed.append(batch.version)
        if dist.get_rank() == rank and len(passed) == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return align(batch, *sections)

    loop.align = stopped


if __name__ == "__main__":
    hang(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[4:]))
