"""The asynchronous loop. Generation runs in its own process all the while; here is what a step does with its samples.

wait for the batch of this version -> align -> train on it -> publish the new weights -> write down what happened
"""

import contextlib
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.reference import Reference
from megatron_a3po.config import Config
from megatron_a3po.config.vllm_checks import RUN_TOKEN
from megatron_a3po.errors import OutputError, TrainingError
from megatron_a3po.lifetime import kill_point
from megatron_a3po.logs import StepFilter
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.rollout.spans import Span
from megatron_a3po.trainer.attempt import Attempt, newest_attempt
from megatron_a3po.trainer.batch import Batch, align, batch_path, save_batch
from megatron_a3po.trainer.canary import prove_update
from megatron_a3po.trainer.clock import Clock
from megatron_a3po.trainer.journal import Journal
from megatron_a3po.trainer.method import Method
from megatron_a3po.trainer.probe import probe
from megatron_a3po.trainer.saving import Saving
from megatron_a3po.trainer.shown import Shown
from megatron_a3po.trainer.source import Source, from_main
from megatron_a3po.trainer.step import train_step
from megatron_a3po.trainer.trace import follow
from megatron_a3po.weights.aside import what_failed
from megatron_a3po.weights.publishing import forget_old_versions, version_directory
from megatron_a3po.weights.transports.base import Transport
from megatron_a3po.weights.transports.files import FilesTransport

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """The counters a checkpoint keeps."""

    step: int = 0  # training steps completed, and so the version of the weights
    skipped_in_a_row: int = 0
    steps_without_fresh_tokens: int = 0
    accuracy_before: float | None = None
    wall_seconds: float = 0.0


@dataclass(kw_only=True)
class Run:
    """What the loop works with. `client` and `journal` exist on rank 0 only."""

    config: Config
    actor: Actor
    attempt: Attempt
    saving: Saving
    source: Source
    client: RolloutClient | None
    journal: Journal | None
    progress: Progress
    step_filter: StepFilter
    reference: Reference | None = None
    num_published: int = 0
    unpublished: OutputError | None = None  # why the weights of this moment are not
    transport: Transport = field(default_factory=FilesTransport)
    clock: Clock = field(default_factory=Clock)
    timeline: list[Span] = field(default_factory=list)  # of this rank, in the steps of `trainer.trace`
    served: int = field(init=False)  # the newest version that engines can have

    def __post_init__(self) -> None:
        self.served = self.progress.step

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


def train(run: Run) -> bool:
    """Steps until `trainer.steps`; False where a signal asked to stop before. Collective over all ranks."""
    method = Method.of(run.config.actor)
    prove_update(run)
    run.clock.take()
    while run.progress.step < run.config.trainer.steps:
        version = run.progress.step
        run.step_filter.step = version + 1
        with run.clock("wait_for_samples"):
            batch = run.source.next(version)
        if batch is None:
            return False
        with run.clock("align"):
            mini_batches = align(batch, run.config.actor, run.config.rollout)
        shown = Shown.of(batch, version + 1, run.config.trainer.sample_every)
        metrics = train_step(run.actor, mini_batches, method, run.clock, shown, run.reference)
        from_main(run.actor.grid, run.attempt.refuse_if_fenced)
        run.progress.step += 1
        if run.source.publishes:
            with run.clock("publish"):
                publish(run)
            with run.clock("canary"):
                if run.unpublished is None:
                    prove_update(run)
        metrics |= probe(run, metrics)
        follow(run)
        write_down(run, batch, shown, metrics)
        stop_where_nothing_is_learned(run, metrics)
        stop_where_nothing_new_is_sampled(run)
        with run.clock("checkpoint"):
            run.saving.go_on()
            if due(run.config.trainer.save_every, run.progress.step):
                save(run)
    return True


def publish(run: Run) -> None:
    """Make the weights of the version just made available and tell the rollout process. Where they cannot be written,
    the engines keep the ones they have, and the next step tries again with its own. Collective."""
    root, version = published_weights(run.attempt), run.progress.step
    directory = version_directory(root, version)

    def announce() -> None:
        kill_point("mid_publish")
        cast(RolloutClient, run.client).publish(version, directory)
        forget_old_versions(root, keep=3 + run.config.rollout.bound)

    try:
        run.transport.publish(run.actor.export(), version, directory, announce)
    except OutputError as error:
        run.unpublished = error
    else:
        run.unpublished, run.served = None, version
        run.num_published += 1


def published_weights(attempt: Attempt) -> Path:
    """Where versions lie for the engines; gone when the attempt ends."""
    return attempt.run_dir / "weights" / f"attempt-{attempt.number}"


def forget_published_before(attempt: Attempt) -> None:
    """What attempts that were killed had published."""
    shutil.rmtree(attempt.run_dir / "weights", ignore_errors=True)


def forget_published(attempt: Attempt) -> None:
    """What this attempt has published, and the token of the servers it launched; another one may be at it."""
    shutil.rmtree(published_weights(attempt), ignore_errors=True)
    if newest_attempt(attempt.run_dir) == attempt.number:
        (attempt.run_dir / RUN_TOKEN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (attempt.run_dir / "weights").rmdir()


def save(run: Run) -> None:
    """Begin a checkpoint of the step just completed; it is written while training goes on. Collective."""
    if run.journal is not None:
        run.progress.wall_seconds = run.journal.wall_seconds
    run.saving.begin(vars(run.progress), None if run.client is None else run.client.state())


def save_and_wait(run: Run) -> None:
    """A checkpoint of the step just completed, for a run that ends here. Collective. Errors: OutputError."""
    save(run)
    if problem := run.saving.finish():
        raise OutputError(f"no checkpoint of step {run.progress.step}: {problem}")


def write_down(run: Run, batch: Batch, shown: Shown, metrics: dict[str, Any]) -> None:
    """Rank 0's notes on a step: metrics, samples, the batch itself, an evaluation that has come in."""
    intervals = run.clock.intervals.get("forward_backward", [])
    seconds = run.clock.take()  # what comes after this counts for the next step
    if run.journal is None:
        return
    step, version = run.progress.step, batch.version
    metrics |= run.source.statistics | seconds
    if run.client is not None and intervals:
        metrics["rollout/sampled_while_training"] = run.client.sampled_between(
            intervals[0][0], intervals[-1][1]
        )
    if run.config.trainer.dump_batches:
        _dump(batch_path(run.run_dir / "batches", step), batch)
    run.journal.step(step, version, shown, metrics)
    run.progress.accuracy_before = run.journal.accuracy.get(0, run.progress.accuracy_before)
    if due(run.config.trainer.evaluate_every, step) and step < run.config.trainer.steps:
        evaluate(run)


def _dump(file: Path, batch: Batch) -> None:
    try:
        save_batch(file, batch)
    except OSError as error:
        logger.error("%s: this batch is not kept, and the run goes on", what_failed(error, file))


def evaluate(run: Run) -> None:
    """Ask for the accuracy of the weights of this moment. Nobody waits: it is written down when it is there."""
    if run.client is not None and run.journal is not None and run.config.data.held_out:
        run.journal.expect(run.progress.step, run.client.evaluate(run.progress.step))


def stop_where_nothing_is_learned(run: Run, metrics: dict[str, Any]) -> None:
    """Too many steps in a row with a skipped update: TrainingError on every rank."""
    run.progress.skipped_in_a_row = run.progress.skipped_in_a_row + 1 if metrics["steps_skipped"] else 0
    if run.progress.skipped_in_a_row >= run.config.trainer.max_skipped_steps:
        raise TrainingError(
            f"{run.progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient "
            f"(trainer.max_skipped_steps={run.config.trainer.max_skipped_steps}); lower actor.lr or look at the "
            f"trajectories named in {run.run_dir / 'logs'}"
        )


def stop_where_nothing_new_is_sampled(run: Run) -> None:
    """OutputError on every rank where weights could not be published and the bound allows no step without them."""
    if run.unpublished is None:
        return
    version, rollout = run.progress.step, run.config.rollout
    why = f"the weights of version {version} are not published: {run.unpublished}"
    last = version == run.config.trainer.steps
    if last or rollout.fixed_staleness is not None or version - run.served > rollout.bound:
        key = "fixed_staleness" if rollout.fixed_staleness is not None else "max_staleness"
        needs = "the end of the run" if last else f"rollout.{key}={rollout.bound}"
        raise OutputError(f"{why}. Engines have version {run.served}, and {needs} needs newer ones")
    logger.error(
        "%s. The run goes on with samples of version %d, as far as rollout.max_staleness=%d allows",
        why,
        run.served,
        rollout.bound,
    )


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
