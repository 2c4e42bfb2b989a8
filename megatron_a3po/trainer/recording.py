"""What a run leaves behind as it goes: metrics.jsonl, TensorBoard event files, samples.jsonl. And the one reader of it.

`read_metrics` needs no torch: reports are made where nothing else is installed. What is written at the end is in
`summary.py`, what a person watches meanwhile in `progress.py`.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a3po.trainer.json_lines import JsonLines, plain, read_rows

if TYPE_CHECKING:
    from megatron_a3po.rollout.trajectory import Group, Trajectory
    from megatron_a3po.trainer.batch import Batch

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"


class Recorder:
    """Writes into a run directory, or into its warm_start/. `attempt` counts the starts of the run."""

    def __init__(self, run_dir: Path, *, attempt: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        self._attempt = attempt
        self._metrics = JsonLines(run_dir / METRICS)
        self._samples: JsonLines | None = None
        self._make_writer = partial(SummaryWriter, str(run_dir / TENSORBOARD))
        self._writer: SummaryWriter | None = None

    def record(self, step: int, version: int, metrics: dict[str, Any]) -> None:
        """One row, durable when this returns. Numbers go to TensorBoard too; histograms and nulls do not."""
        row = plain({"step": step, "version": version, "attempt": self._attempt, **metrics})
        self._metrics.append(row)
        if self._writer is None:
            # A resumed run takes some steps again: TensorBoard then forgets those of the attempt before.
            self._writer = self._make_writer(purge_step=step)
        for name, value in row.items():
            if name in metrics and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def samples(self, step: int, batch: "Batch", tokenizer: Any, limit: int = 4) -> None:
        """The first trajectory of up to `limit` groups, spread over the batch."""
        if self._samples is None:
            self._samples = JsonLines(self._run_dir / SAMPLES)
        shown = min(limit, len(batch.groups))
        for group in (batch.groups[place * len(batch.groups) // shown] for place in range(shown)):
            row = _sample(group, group.trajectories[0], tokenizer)
            self._samples.append({"step": step, "current_version": batch.version, **row})

    def close(self) -> None:
        for file in (self._metrics, self._samples, self._writer):
            if file is not None:
                file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step. A resumed run takes some steps again: the last row of a step counts. A
    non-finite number reads as None; a run that has recorded nothing has no rows."""
    rows = {row["step"]: row for row in read_rows(Path(run_dir) / METRICS) if "step" in row}
    return [rows[step] for step in sorted(rows)]


def _sample(group: "Group", trajectory: "Trajectory", tokenizer: Any) -> dict[str, Any]:
    """A trajectory for people: the texts beside the arrays. As the reward sees it, the response has no EOS."""
    response = trajectory.tokens[trajectory.prompt_length :].tolist()
    return {
        "prompt": group.prompt,
        "response": tokenizer.decode(response, skip_special_tokens=True),
        "tokens": trajectory.tokens,
        "versions": trajectory.versions,
        "behave_logp": trajectory.behave_logp,
        "reward": trajectory.reward,
        "finish_reason": trajectory.finish_reason,
    }
