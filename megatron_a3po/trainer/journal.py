"""Rank 0's account of a run: rows, samples, the display, and evaluations that come in while the loop goes on."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_a3po.config import Config
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.trainer.batch import Batch
from megatron_a3po.trainer.progress import Display
from megatron_a3po.trainer.recording import Recorder


class Journal:
    """What the run says while it goes on."""

    def __init__(self, config: Config, attempt: int, display: Display, tokenizer: Any) -> None:
        self.config, self.display, self.tokenizer = config, display, tokenizer
        self.recorder = Recorder(Path(config.run_dir), attempt=attempt)
        self.accuracy: float | None = None
        self._expected: list[tuple[int, Future[Evaluation]]] = []

    def expect(self, step: int, evaluation: "Future[Evaluation]") -> None:
        """An evaluation of the weights after `step` has been asked for; it is written down when it is there."""
        self._expected.append((step, evaluation))

    def step(self, step: int, version: int, batch: Batch, metrics: dict[str, Any]) -> None:
        """A step's row. Evaluations that have come in meanwhile go with it, with the version they are of."""
        while self._expected and self._expected[0][1].done():
            _, future = self._expected.pop(0)
            evaluation = future.result()
            self.accuracy = evaluation.accuracy
            metrics |= {"evaluation/accuracy": evaluation.accuracy, "evaluation/version": evaluation.version}
        self.recorder.record(step, version, metrics)
        if step % self.config.trainer.sample_every == 0 or step == 1:
            self.recorder.samples(step, batch, self.tokenizer)
        self.display.step(step, metrics, self.accuracy)

    def close(self) -> None:
        self.recorder.close()
