"""Rank 0's account of a run: rows, samples, the display, and evaluations that come in while the loop goes on."""

import contextlib
import logging
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_a3po.config import Config
from megatron_a3po.config.difference import flat
from megatron_a3po.errors import A3POError
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.trainer.health import Finding, Health
from megatron_a3po.trainer.mirror import Mirror
from megatron_a3po.trainer.progress import Display
from megatron_a3po.trainer.recording import Recorder, read_findings, read_metrics
from megatron_a3po.trainer.shown import Shown
from megatron_a3po.trainer.summary import closing_lines, mean_of, summarize, write_summary

logger = logging.getLogger(__name__)

FIRST_ACCURACY_S = 20.0
FULL_PIPELINE_STEP = 10  # by then generation runs as far ahead as the bound lets it


class Journal:
    """What the run says, shows and writes down while it goes on; a context, on rank 0 only."""

    def __init__(self, config: Config, attempt: int, tokenizer: Any) -> None:
        self.config, self.tokenizer, self.run_dir = config, tokenizer, Path(config.run_dir)
        self._started, self.earlier_s = time.monotonic(), 0.0  # seconds of the attempts before this one
        self.display = Display(config, config.trainer.steps)
        self.recorder = Recorder(self.run_dir, attempt=attempt)
        self.warm_start_recorder = (
            Recorder(self.run_dir / "warm_start", attempt=attempt) if config.warm_start else None
        )
        self.mirror = Mirror(self.run_dir) if config.trainer.wandb else None
        said = [finding.cause for finding in read_findings(self.run_dir)]
        self.health = Health(flat(config.model_dump(mode="json")), said)
        for row in read_metrics(self.run_dir):  # of earlier attempts: what they said is said
            self.health.see(row)
        self.accuracy: dict[int, float] = {}  # of the weights after a step
        self._expected: list[tuple[int, Future[Evaluation]]] = []

    def __enter__(self) -> "Journal":
        self.display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.display.__exit__(kind, error, trace)
        for recorder in (self.recorder, self.warm_start_recorder):
            if recorder is not None:
                recorder.close()
        if self.mirror is not None:
            self.mirror.close()

    def warm_start(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """A supervised step's row."""
        assert self.warm_start_recorder is not None
        self.warm_start_recorder.record(step, 0, metrics)
        self.display.warm_start(step, steps, metrics)

    def expect(self, step: int, evaluation: "Future[Evaluation]") -> None:
        """An evaluation of the weights after `step` was asked for; it is written down when it is there."""
        self._expected.append((step, evaluation))

    def step(self, step: int, version: int, shown: Shown, metrics: dict[str, Any]) -> None:
        """A step's row. Evaluations that have come in meanwhile go with it, with the version they are of."""
        while self._expected and self._expected[0][1].done() and not self._expected[0][1].exception():
            evaluation = self._take_evaluation()
            metrics |= {"evaluation/accuracy": evaluation.accuracy, "evaluation/version": evaluation.version}
        self.recorder.record(step, version, metrics)
        self._warn(self.health.see({"step": step, **metrics}))
        self.recorder.samples(step, version, shown, self.tokenizer)
        latest = self.accuracy[max(self.accuracy)] if self.accuracy else None
        self.display.step(step, metrics, latest)

    def wait(self, step: int, num_filtered: int) -> None:
        """The batch of `step` is not there yet, and so many groups have been filtered since the last one."""
        self._warn(self.health.see_waiting(step, num_filtered))

    def _warn(self, findings: list[Finding]) -> None:
        for finding in findings:
            logger.warning(finding.sentence)
            self.recorder.finding(finding)

    @property
    def wall_seconds(self) -> float:
        """Of the whole run, earlier attempts included."""
        return self.earlier_s + time.monotonic() - self._started

    def first_accuracy(self, known: float | None) -> float | None:
        """Accuracy before the first step; where its evaluation is still under way, that is waited for a moment."""
        for step, future in self._expected:
            if step == 0 and known is None:
                with contextlib.suppress(TimeoutError, A3POError):
                    return future.result(FIRST_ACCURACY_S).accuracy
        return self.accuracy.get(0, known)

    def settle(self, timeout_s: float) -> None:
        """Wait for the evaluations still on their way; TimeoutError where one takes longer: call it again."""
        while self._expected:
            self._take_evaluation(timeout_s)

    def finish(self, status: str, accuracy_before: float | None, export: Path | None) -> None:
        """Write summary.json, say how it went."""
        # Once the pipeline is full: before, nothing newer than the first weights has been published.
        rows = [row for row in read_metrics(self.run_dir) if row["step"] > FULL_PIPELINE_STEP]
        summary = summarize(
            self.run_dir,
            status=status,
            accuracy_before=self.accuracy.get(0, accuracy_before),
            accuracy_after=self.accuracy.get(self.config.trainer.steps),
            export=export,
            wall_seconds=self.wall_seconds,
            multi_version_fraction=mean_of(rows, "rollout/multi_version_fraction"),
        )
        write_summary(self.run_dir, summary)
        for line in closing_lines(summary):
            self.display.say(line)

    def _take_evaluation(self, timeout_s: float | None = None) -> Evaluation:
        step, future = self._expected[0]
        evaluation = future.result(timeout_s)
        self._expected.pop(0)
        self.accuracy[step] = evaluation.accuracy
        return evaluation
