"""One trainer rank from its first line to its exit code: join the grid, build the actor, warm up, loop, export."""

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from megatron_a3po.actor import checkpoint as actor_checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.grid import Grid, build_grid, leave_grid
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.actor.reference import Reference
from megatron_a3po.actor.roll_call import RollCall
from megatron_a3po.config import Config, read_model_shape
from megatron_a3po.config.plan import plan_lines
from megatron_a3po.errors import EXIT_DONE, EXIT_STOPPED, A3POError, OutputError, ServersGone, TrainingError
from megatron_a3po.lifetime import StopWish
from megatron_a3po.logs import StepFilter, set_up_logs
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.rollout.prompts import read_examples, tokenize
from megatron_a3po.rollout.tokenizer import load_tokenizer
from megatron_a3po.rollout.vllm.configured import refuse_unsuitable_servers
from megatron_a3po.trainer import loop, recovery
from megatron_a3po.trainer.attempt import Attempt
from megatron_a3po.trainer.journal import Journal
from megatron_a3po.trainer.loop import (
    Progress,
    Run,
    forget_published,
    forget_published_before,
    published_weights,
)
from megatron_a3po.trainer.recovery import Beginning
from megatron_a3po.trainer.rollout_state import read_rollout_state
from megatron_a3po.trainer.saving import Saving
from megatron_a3po.trainer.source import LiveSource, ReplaySource, from_main, wait_on_main
from megatron_a3po.trainer.summary import closing_lines
from megatron_a3po.trainer.warm_start import demonstrations, warm_start
from megatron_a3po.weights.publishing import create_transport, version_directory
from megatron_a3po.weights.sources import check_weights
from megatron_a3po.weights.transports.base import Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str


def run_rank(config: Config, place: Place, beginning: Beginning | None, resume: str, stop: StopWish) -> int:
    """Exit code of this rank; what nobody foresaw is logged and raised.

    beginning: decided by the parent; None under a launcher, where rank 0 decides.
    """
    torch.set_num_threads(1)
    # Until it is decided what becomes of the run directory, nothing is written there.
    decided = config.run_dir if beginning else None
    step_filter = set_up_logs(decided, f"rank-{place.rank}", speaks=place.rank == 0)
    try:
        check_weights(config.model)
        grid = build_grid(
            config.actor,
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            init_method=place.init_method,
            seed=config.trainer.seed,
            timeout_s=config.distributed.timeout_s,
        )
        if beginning is None:
            beginning = from_main(grid, lambda: recovery.begin(config, resume))
            decided = config.run_dir
            step_filter = set_up_logs(decided, f"rank-{place.rank}", speaks=place.rank == 0)
        if beginning.kind == "finished":
            code = _show_finished(grid, beginning)
        elif from_main(grid, lambda: stop.wished):
            logger.info("stopped before it began: run again to continue")
            code = EXIT_STOPPED
        else:
            code = _session(config, grid, beginning, stop, step_filter)
        leave_grid()
        return code
    except A3POError as error:
        if place.rank == 0:
            sys.stderr.write("".join(f"{problem}\n" for problem in error.problems))
        set_up_logs(decided, f"rank-{place.rank}", speaks=False)
        logger.error("stopped: %s", error)
        return error.exit_code
    except BaseException:  # torch's checkpoint errors are no Exceptions
        # The first rank to fail has the cause; its peers follow with broken connections. Each to its own file, if any.
        set_up_logs(decided, f"rank-{place.rank}", speaks=decided is None)
        logger.critical("rank %d failed:\n%s", place.rank, traceback.format_exc())
        raise


def _show_finished(grid: Grid, beginning: Beginning) -> int:
    if grid.is_main:
        sys.stdout.write("\n".join(closing_lines(beginning.summary)) + "\n")
    return EXIT_DONE


def _session(
    config: Config, grid: Grid, beginning: Beginning, stop: StopWish, step_filter: StepFilter
) -> int:
    shape = read_model_shape(config.model.hf_path)
    tokenizer = load_tokenizer(config.model.hf_path)
    with ExitStack() as stack:
        attempt, beginning = from_main(grid, partial(recovery.claim, config, beginning, stack))
        stack.enter_context(_fenced_first(attempt))
        stack.enter_context(RollCall(grid.world_rank, grid.world_size, config.distributed.timeout_s))
        journal = None
        if grid.is_main:
            for note in beginning.notes:
                logger.warning(note)
            journal = stack.enter_context(Journal(config, attempt.number, tokenizer))
            journal.display.plan(plan_lines(config, shape, grid.dp.size))
        from_main(grid, partial(refuse_unsuitable_servers, config))
        actor = Actor(
            config.actor,
            config.model,
            shape,
            grid,
            temperature=config.rollout.temperature,
            seed=config.trainer.seed,
        )
        if beginning.checkpoint is None and not _warm_start(config, actor, tokenizer, journal, stop):
            return EXIT_STOPPED
        reference = _reference(config, actor, beginning.checkpoint)
        actor.start_stage(_schedule(config))
        progress, rollout_state = _restore(actor, beginning.checkpoint)
        saving = Saving(config, actor, attempt)
        stack.callback(saving.abandon)
        if beginning.checkpoint is None and config.warm_start is not None:
            saving.begin(vars(progress), None)  # so that the warm start is done once
        transport = create_transport(config.rollout, grid.device)
        source: LiveSource | ReplaySource
        if config.needs_rollouts:
            stack.callback(transport.close)
            client = _start_rollouts(config, actor, attempt, transport, progress, rollout_state)
            if client is not None:
                stack.callback(forget_published, attempt)
                stack.callback(client.stop)
            source = LiveSource(grid, client, stop, attempt, journal)
        else:
            client, source = None, ReplaySource(grid, config, shape.vocab_size, stop)
        if journal is not None:
            journal.earlier_s = progress.wall_seconds
        run = Run(
            config=config,
            actor=actor,
            attempt=attempt,
            saving=saving,
            source=source,
            client=client,
            journal=journal,
            progress=progress,
            step_filter=step_filter,
            reference=reference,
            transport=transport,
        )
        return _train_or_save(run)


@contextmanager
def _fenced_first(attempt: Attempt) -> Iterator[None]:
    """What goes wrong once a later start has taken the run over is that start's doing. Errors: FencedError."""
    try:
        yield
    except BaseException:
        attempt.refuse_if_fenced()
        raise


def _train_or_save(run: Run) -> int:
    """What every rank finds at the same step leaves a checkpoint behind."""
    try:
        return _train(run)
    except ServersGone as error:
        loop.save_and_wait(run)
        raise ServersGone(
            f"{error}; stopped after step {run.progress.step} with a checkpoint: see to the servers, and run again "
            "to continue."
        ) from error
    except TrainingError:  # what was saved before it is as good as ever
        run.saving.finish()
        raise


def _train(run: Run) -> int:
    """The loop between its first evaluation and its last, then the export."""
    loop.evaluate(run)
    with _checkpoint_before_the_end(run):
        finished = loop.train(run)
    if not finished:
        if run.journal is not None:
            run.progress.accuracy_before = run.journal.first_accuracy(run.progress.accuracy_before)
        loop.save_and_wait(run)
        logger.info("stopped after step %d with a checkpoint: run again to continue", run.progress.step)
        return EXIT_STOPPED
    run.saving.finish()
    loop.evaluate(run)
    from_main(run.actor.grid, run.attempt.refuse_if_fenced)
    export = run.run_dir / "export"
    with _checkpoint_before_the_end(run):
        run.actor.write_hugging_face(export, with_tokenizer=True)
    wait_on_main(run.actor.grid, lambda timeout_s: cast(Journal, run.journal).settle(timeout_s))
    from_main(run.actor.grid, run.attempt.refuse_if_fenced)
    before = run.progress.accuracy_before
    from_main(run.actor.grid, lambda: cast(Journal, run.journal).finish("done", before, export))
    return EXIT_DONE


@contextmanager
def _checkpoint_before_the_end(run: Run) -> Iterator[None]:
    """A file that cannot be written ends the run; a checkpoint may find room all the same, or be elsewhere."""
    try:
        yield
    except OutputError as error:
        loop.save(run)
        step = run.progress.step
        if problem := run.saving.finish():
            end = f"no checkpoint of step {step} either: {problem}. Run again to continue from the last"
        else:
            end = f"stopped after step {step} with a checkpoint: run again to continue"
        raise OutputError([*error.problems, end]) from error


def _warm_start(
    config: Config, actor: Actor, tokenizer: Any, journal: Journal | None, stop: StopWish
) -> bool:
    """The supervised steps, if the configuration asks for any; False where a signal ended them."""
    section = config.warm_start
    if section is None:
        return True
    examples = read_examples(section.data or config.data.train, with_response=True)
    sequences = demonstrations(tokenize(examples, tokenizer, config.data.max_prompt_tokens), tokenizer)
    for step, metrics in warm_start(actor, section, sequences, config.trainer.seed):
        if journal is not None:
            journal.warm_start(step, section.steps, metrics)
        if from_main(actor.grid, lambda: stop.wished):
            logger.info("stopped in the warm start, which has no checkpoint: run again to begin anew")
            return False
    return True


def _reference(config: Config, actor: Actor, checkpoint: Path | None) -> Reference | None:
    """The policy the RL steps begin with, for a KL term: kept before the first step, read again at every start."""
    if config.actor.kl_coef == 0:
        return None
    directory = recovery.reference_directory(Path(config.run_dir))
    if checkpoint is None:
        actor.write_hugging_face(directory, with_tokenizer=True)
    else:
        from_main(actor.grid, lambda: recovery.keep_reference(directory, checkpoint))
    return Reference(actor, directory)


def _restore(actor: Actor, checkpoint: Path | None) -> tuple[Progress, dict[str, Any] | None]:
    if checkpoint is None:
        return Progress(), None
    actor_checkpoint.load(actor, checkpoint / "actor")
    counters = recovery.read_trainer_state(checkpoint)
    for name in ("attempt", "data"):
        counters.pop(name, None)
    progress = Progress(**counters)
    return progress, read_rollout_state(checkpoint / recovery.ROLLOUTS)


def _start_rollouts(
    config: Config,
    actor: Actor,
    attempt: Attempt,
    transport: Transport,
    progress: Progress,
    state: dict[str, Any] | None,
) -> RolloutClient | None:
    """Publish the version the run goes on from and start generating with it; the client exists on rank 0 only."""
    from_main(actor.grid, lambda: forget_published_before(attempt))
    directory = version_directory(published_weights(attempt), progress.step)
    transport.publish(actor.export(), progress.step, directory, announce=lambda: None)
    if not actor.grid.is_main:
        return None
    return RolloutClient.start(
        config, attempt.run_dir, state, progress.step, directory, attempt=attempt.number
    )


def _schedule(config: Config) -> Schedule:
    actor = config.actor
    return Schedule(
        lr=actor.lr,
        min_lr=actor.min_lr,
        lr_warmup_iters=actor.lr_warmup_iters,
        lr_decay_style=actor.lr_decay_style,
        lr_decay_iters=actor.lr_decay_iters or config.optimizer_steps,
    )
