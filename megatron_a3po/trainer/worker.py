"""One trainer rank from its first line to its exit code: join the grid, build the actor, warm up, loop, export."""

import logging
import sys
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_a3po.actor import checkpoint as actor_checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.grid import Grid, build_grid, leave_grid
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config import Config, read_model_shape
from megatron_a3po.config.plan import plan_lines
from megatron_a3po.errors import EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_STOPPED, A3POError
from megatron_a3po.logs import StepFilter, set_up_logs
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.rollout.prompts import read_examples, tokenize
from megatron_a3po.rollout.trajectory import Evaluation
from megatron_a3po.trainer import loop, recovery
from megatron_a3po.trainer.journal import Journal
from megatron_a3po.trainer.loop import Progress, Run
from megatron_a3po.trainer.progress import Display
from megatron_a3po.trainer.recording import Recorder, read_metrics
from megatron_a3po.trainer.recovery import Beginning
from megatron_a3po.trainer.source import LiveSource, ReplaySource, StopWish, from_main
from megatron_a3po.trainer.summary import closing_lines, mean_of, summarize, write_summary
from megatron_a3po.trainer.warm_start import demonstrations, warm_start
from megatron_a3po.weights.publishing import version_directory

logger = logging.getLogger(__name__)

FULL_PIPELINE_STEP = 10  # by then generation runs as far ahead as the bound lets it


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str


def run_rank(config: Config, place: Place, beginning: Beginning | None, resume: str) -> int:
    """Exit code of this rank. beginning: decided by the parent; None under a launcher, where rank 0 decides."""
    started = time.time()
    stop = StopWish()
    stop.listen()
    torch.set_num_threads(1)
    step_filter = set_up_logs(config.run_dir, f"rank-{place.rank}", speaks=place.rank == 0)
    try:
        grid = build_grid(
            config.actor,
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            init_method=place.init_method,
            seed=config.trainer.seed,
            timeout_s=config.distributed.timeout_s,
        )
        beginning = beginning or from_main(grid, lambda: recovery.begin(config, resume))
        code = _session(config, grid, beginning, stop, step_filter, started)
        leave_grid()
        return code
    except A3POError as error:
        if place.rank == 0:
            sys.stderr.write("".join(f"{problem}\n" for problem in error.problems))
        logger.error("stopped: %s", error)
        return error.exit_code
    except Exception:
        # The process boundary. The first rank to fail has the cause; its peers follow with broken connections, so
        # tracebacks go to the ranks' own files.
        set_up_logs(config.run_dir, f"rank-{place.rank}", speaks=False)
        logger.critical("rank %d failed:\n%s", place.rank, traceback.format_exc())
        return EXIT_NEEDS_PERSON


def _session(
    config: Config, grid: Grid, beginning: Beginning, stop: StopWish, step_filter: StepFilter, started: float
) -> int:
    shape = read_model_shape(config.model.hf_path)
    tokenizer = _tokenizer(config.model.hf_path)
    with Display(config, config.trainer.steps) if grid.is_main else _Silent() as display:
        if grid.is_main:
            recovery.claim(config, beginning.attempt)
            display.plan(plan_lines(config, shape, grid.dp.size))
        actor = Actor(
            config.actor,
            config.model,
            shape,
            grid,
            temperature=config.rollout.temperature,
            seed=config.trainer.seed,
        )
        if beginning.checkpoint is None and config.warm_start is not None:
            _warm_start(config, actor, tokenizer, display, beginning)
        actor.start_stage(_schedule(config))
        progress, rollout_state = _restore(actor, beginning.checkpoint)
        journal = Journal(config, beginning.attempt, display, tokenizer) if grid.is_main else None
        client = _start_rollouts(config, actor, progress, rollout_state)
        source: Any = (
            LiveSource(grid, client, stop)
            if config.needs_rollouts
            else ReplaySource(grid, Path(config.trainer.replay or ""), stop)
        )
        run = Run(config, actor, source, client, journal, progress, step_filter=step_filter)
        try:
            return _train_and_finish(run, started)
        finally:
            if client is not None:
                client.stop()
            if journal is not None:
                journal.close()


def _train_and_finish(run: Run, started: float) -> int:
    config, client, progress = run.config, run.client, run.progress
    before: Future[Evaluation] | None = None
    if client is not None and config.data.held_out and progress.accuracy_before is None:
        before = client.evaluate(progress.step)
        assert run.journal is not None
        run.journal.expect(progress.step, before)
    finished = loop.train(run)
    if before is not None:
        progress.accuracy_before = loop.result(before)
    if not finished:
        loop.save(run)
        if run.journal is not None:
            run.journal.display.say(
                f"stopped after step {progress.step} with a checkpoint: run again to continue"
            )
        return EXIT_STOPPED
    if config.trainer.save_every is not None:
        loop.save(run)
    export = run.run_dir / "export"
    run.actor.write_hugging_face(export, with_tokenizer=True)
    if run.journal is not None:
        after = client.evaluate(progress.step) if client is not None and config.data.held_out else None
        summary = summarize(
            run.run_dir,
            status="done",
            accuracy_before=progress.accuracy_before,
            accuracy_after=loop.result(after),
            export=str(export),
            wall_seconds=time.time() - started,
            multi_version_fraction=_multi_version_fraction(run.run_dir),
        )
        write_summary(run.run_dir, summary)
        for line in closing_lines(summary):
            run.journal.display.say(line)
    return EXIT_DONE


def _multi_version_fraction(run_dir: Path) -> float | None:
    """Share of the trained responses with tokens of several versions, once the pipeline is full."""
    rows = [row for row in read_metrics(run_dir) if row["step"] > FULL_PIPELINE_STEP]
    return mean_of(rows, "rollout/multi_version_fraction")


def _warm_start(config: Config, actor: Actor, tokenizer: Any, display: Any, beginning: Beginning) -> None:
    section = config.warm_start
    assert section is not None
    examples = read_examples(section.data or config.data.train, with_response=True)
    sequences = demonstrations(tokenize(examples, tokenizer, config.data.max_prompt_tokens), tokenizer)
    recorder = (
        Recorder(Path(config.run_dir) / "warm_start", attempt=beginning.attempt)
        if actor.grid.is_main
        else None
    )

    def record(step: int, metrics: dict[str, Any]) -> None:
        if recorder is not None:
            recorder.record(step, 0, metrics)
            display.warm_start(step, section.steps, metrics)

    warm_start(actor, section, sequences, config.trainer.seed, record)
    if recorder is not None:
        recorder.close()


def _restore(actor: Actor, checkpoint: Path | None) -> tuple[Progress, dict[str, Any] | None]:
    if checkpoint is None:
        return Progress(), None
    actor_checkpoint.load(actor, checkpoint / "actor")
    return Progress(**recovery.read_trainer_state(checkpoint)), recovery.read_rollout_state(checkpoint)


def _start_rollouts(
    config: Config, actor: Actor, progress: Progress, state: dict[str, Any] | None
) -> RolloutClient | None:
    """Publish the version the run goes on from and start generating with it; the client exists on rank 0 only."""
    if not config.needs_rollouts:
        return None
    run_dir = Path(config.run_dir)
    directory = version_directory(run_dir / "weights", progress.step)
    actor.write_hugging_face(directory)
    if not actor.grid.is_main:
        return None
    return RolloutClient.start(config, run_dir, state, progress.step, directory)


def _schedule(config: Config) -> Schedule:
    actor = config.actor
    return Schedule(
        lr=actor.lr,
        min_lr=actor.min_lr,
        lr_warmup_iters=actor.lr_warmup_iters,
        lr_decay_style=actor.lr_decay_style,
        lr_decay_iters=actor.lr_decay_iters or config.optimizer_steps,
    )


def _tokenizer(hf_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf_path, local_files_only=True)


class _Silent:
    """The display of every rank but 0."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...
