"""What a run leaves behind as it goes: metrics.jsonl, TensorBoard event files, samples.jsonl, findings.jsonl.

metrics.jsonl is the source of truth; `tensorboard.py` and `mirror.py` (Weights & Biases) follow it and hold nothing up.
`read_metrics`, the one reader, needs no torch: reports are made where nothing else is installed. What is written at the
end is in `summary.py`, what a person watches meanwhile in `progress.py`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a3po.trainer.health import Finding
from megatron_a3po.trainer.json_lines import JsonLines, plain, read_rows
from megatron_a3po.trainer.tensorboard import TensorBoard

if TYPE_CHECKING:
    from megatron_a3po.trainer.shown import Decoder, Shown

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
FINDINGS = "findings.jsonl"
TENSORBOARD = "tensorboard"
TRACE = "trace.json"


class Recorder:
    """Writes into a run directory, or into its warm_start/. `attempt` counts the starts of the run."""

    def __init__(self, run_dir: Path, *, attempt: int) -> None:
        self._run_dir = run_dir
        self._attempt = attempt
        self._metrics = JsonLines(run_dir / METRICS)
        self._samples: JsonLines | None = None
        self._findings: JsonLines | None = None
        self._tensorboard = TensorBoard(run_dir / TENSORBOARD)

    def record(self, step: int, version: int, metrics: dict[str, Any]) -> None:
        """One row, durable when this returns; its numbers go to TensorBoard too."""
        row = plain({"step": step, "version": version, "attempt": self._attempt, **metrics})
        self._metrics.append(row)
        self._tensorboard.add(step, {name: row[name] for name in metrics})

    def samples(self, step: int, version: int, shown: "Shown", tokenizer: "Decoder") -> None:
        """A row for each trajectory the step shows."""
        if self._samples is None:
            self._samples = JsonLines(self._run_dir / SAMPLES)
        for row in shown.rows(tokenizer):
            self._samples.append({"step": step, "current_version": version, **row})

    def finding(self, finding: Finding) -> None:
        """What a health rule said."""
        if self._findings is None:
            self._findings = JsonLines(self._run_dir / FINDINGS)
        self._findings.append(asdict(finding))

    def close(self) -> None:
        for file in (self._metrics, self._samples, self._findings, self._tensorboard):
            if file is not None:
                file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step. A resumed run takes some steps again: the last row of a step counts, and
    one without a step is none. A non-finite number reads as None; a run that has recorded nothing has no rows."""
    rows = {row["step"]: row for row in read_rows(Path(run_dir) / METRICS) if type(row.get("step")) is int}
    return [rows[step] for step in sorted(rows)]


def read_findings(run_dir: Path) -> list[Finding]:
    """What the health rules said while the run went on."""
    kinds = {"cause": str, "step": int, "sentence": str}
    return [
        Finding(**{name: row[name] for name in kinds})
        for row in read_rows(Path(run_dir) / FINDINGS)
        if all(isinstance(row.get(name), kind) for name, kind in kinds.items())
    ]
