"""The TensorBoard mirror of a run's rows. Its writer has a queue and a thread; a run goes on without it if it fails."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

QUEUED = 100_000  # numbers that wait for a slow disk before the run waits for them


class TensorBoard:
    """Numbers become curves; histograms and nulls are left out."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # where reports are made there need be no torch

        self._new_writer, self._directory = SummaryWriter, directory
        self._writer: SummaryWriter | None = None
        self._has_failed = False

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Never raises: the same numbers are in metrics.jsonl."""
        if self._has_failed:
            return
        try:
            if self._writer is None:
                # A resumed run takes some steps again: TensorBoard then forgets those of the attempt before.
                self._writer = self._new_writer(str(self._directory), max_queue=QUEUED, purge_step=step)
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._has_failed = True
            logger.warning("no more TensorBoard from step %d on, metrics.jsonl has it all: %s", step, error)

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
