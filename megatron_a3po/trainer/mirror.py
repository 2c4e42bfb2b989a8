"""What a run holds of its Weights & Biases mirror: a process, started with the run and ended with it.

Nothing passes between the two but the end: the process reads metrics.jsonl by itself, see `wandb_mirror.py`. What it
has to say to a person becomes a warning of the run. No torch here.
"""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from megatron_a3po.environment import child_environment

logger = logging.getLogger(__name__)

FINISH_S = 30.0
KILL_AFTER_S = 5.0  # more


class Mirror:
    """Starts the process; `close` waits a little for what is still to be sent."""

    def __init__(self, run_dir: Path, finish_s: float = FINISH_S) -> None:
        self._run_dir, self._finish_s = run_dir, finish_s
        log = run_dir / "logs" / "wandb.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "megatron_a3po.trainer.wandb_mirror",
                    str(run_dir),
                    "--follow",
                    str(finish_s),
                ],
                env=child_environment(PYTHONPATH=os.pathsep.join(path for path in sys.path if path)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._listener = threading.Thread(target=self._listen, name="wandb", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Never raises: the numbers are in metrics.jsonl."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(self._finish_s + KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._listener.join()
        if code:
            logger.warning(
                "Weights & Biases has not everything (why is at the end of %s/logs/wandb.log): "
                "`python -m megatron_a3po.trainer.wandb_mirror %s` sends the rest",
                self._run_dir,
                self._run_dir,
            )

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                logger.warning("%s", line.rstrip())
