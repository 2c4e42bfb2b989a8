"""A run directory's past: what it holds, whether this start may continue it, and the checkpoints it continues from.

    checkpoints/step-<n>/     complete when, and only when, the name has no suffix
        actor/                model, optimizer, schedule (actor/checkpoint.py)
        trainer.json          step (and so version), the attempt that made it, what data.train held, what else the
                              loop counts
        model.json            the shape of the model
        rollouts.npz          prompt cursor, prompts in flight, finished groups (trainer/rollout_state.py)
        config.yaml           the configuration it was written under
        manifest.json         format number, sizes and checksums of the files above
    checkpoints/step-<n>.damaged-<attempt>/     passed over by that attempt; nobody reads or removes it

There is no random state to keep: prompts, samples and shuffles are functions of (seed, position). Writing is in
`saving.py`.
"""

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_a3po.config import Config, read_model_shape, to_yaml
from megatron_a3po.config.difference import differing_keys
from megatron_a3po.errors import ConfigError, InputError
from megatron_a3po.trainer.attempt import Attempt, lock
from megatron_a3po.trainer.summary import read_summary
from megatron_a3po.weights.aside import put_back, telling, write_aside, written_aside
from megatron_a3po.weights.manifest import MANIFEST, checksum, damage

FORMAT = 2  # 2: layers by number, rollouts without a pickle
PREFIX = "step-"
ROLLOUTS = "rollouts.npz"
LOGS = "logs"
# Keys without which a count in a checkpoint means something else: of prompts, and of the schedule's steps.
PROMPTS = (
    "data.train",
    "data.max_prompt_tokens",
    "trainer.seed",
    "trainer.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.fixed_staleness",
)
SCHEDULE = (
    "actor.lr",
    "actor.min_lr",
    "actor.lr_warmup_iters",
    "actor.lr_decay_style",
    "actor.weight_decay",
)

Damaged = tuple[tuple[Path, str], ...]  # checkpoints, and what is wrong with each


@dataclass(frozen=True)
class Beginning:
    """How this start goes on from what the run directory holds."""

    kind: Literal["new", "continue", "finished"]
    checkpoint: Path | None = None
    newest: list[Path] = field(default_factory=list)  # checkpoint of this run, damaged or not: at most one
    damaged: Damaged = ()  # of this run, newer than `checkpoint`
    summary: dict[str, Any] = field(default_factory=dict)  # of a finished run
    notes: tuple[str, ...] = ()  # what a person should know, said once there is a log


def begin(config: Config, resume: str) -> Beginning:
    """Decide how this start goes on. Makes the run directory where there is none; `--resume never` renames an old one.

    Errors: ConfigError (another configuration, an unusable run_dir, a checkpoint of another model or beyond the run),
    InputError (no checkpoint at PATH, none that is whole, one of another format).
    """
    run_dir = Path(config.run_dir)
    notes: tuple[str, ...] = ()
    if resume == "never" and run_dir.exists():
        notes = (f"moved the old run to {_move_aside(run_dir)}",)
    checkpoint, newest = None, checkpoints_of(run_dir)[-1:]
    damaged: Damaged = ()
    used = bool(newest) or (run_dir / "config.yaml").is_file()
    if used:
        _refuse_another_configuration(run_dir, config)
        if (summary := read_summary(run_dir)) is not None:
            return Beginning("finished", summary=summary)
        checkpoint, damaged = latest_checkpoint(run_dir)
        if damaged and checkpoint is None:
            raise InputError(
                f"{run_dir / 'checkpoints'} has no whole checkpoint: {_said(damaged)}; copy one again from where there "
                "is a copy, or begin anew with --resume never, which moves the old run aside"
            )
    if checkpoint is None and resume not in ("auto", "never"):
        # Once the run has a checkpoint of its own, it goes on from that.
        checkpoint, notes = _checkpoint_at(Path(resume))
    if checkpoint is not None:
        _refuse_unfit(checkpoint, config)
    _make(run_dir)
    kind: Literal["new", "continue"] = "continue" if used or checkpoint else "new"
    return Beginning(kind, checkpoint, newest, damaged, notes=notes)


def _move_aside(run_dir: Path) -> Path:
    names = (run_dir.with_name(f"{run_dir.name}.old-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    run_dir.rename(aside)
    return aside


def _make(run_dir: Path) -> None:
    """Errors: ConfigError where there can be no such directory, or nothing can be written there."""
    what = "which cannot be made"
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        what = "where nothing can be written"
        for folder in (run_dir, run_dir / LOGS):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"run_dir is {run_dir}, {what} ({error.strerror}); give another run_dir=..."
        ) from None


def _refuse_unfit(checkpoint: Path, config: Config) -> None:
    """Errors: ConfigError where a checkpoint belongs to another model, or is past the end of the run."""
    shape = dataclasses.asdict(read_model_shape(config.model.hf_path))
    saved = json.loads((checkpoint / "model.json").read_text())
    shape = json.loads(json.dumps(shape))
    if keys := [key for key in shape if saved.get(key) != shape[key]]:
        found = ", ".join(f"{key} {saved.get(key)} instead of {shape[key]}" for key in keys)
        raise ConfigError(
            f"{checkpoint} is of another model than model.hf_path={config.model.hf_path} ({found})"
        )
    _refuse_another_meaning(checkpoint, config)
    if (step := read_trainer_state(checkpoint)["step"]) > config.trainer.steps:
        raise ConfigError(
            f"{checkpoint} is of step {step}, but trainer.steps={config.trainer.steps}; raise it or take an earlier one"
        )


def _refuse_another_meaning(checkpoint: Path, config: Config) -> None:
    """What a checkpoint counts (prompts, steps of the schedule) must be counted alike; the rest may be changed for a
    run that goes on from it. Errors: ConfigError names the keys, InputError the data."""
    meaning = set(SCHEDULE)
    if config.actor.lr_decay_style != "constant":
        meaning |= {"actor.lr_decay_iters"}
        if config.actor.lr_decay_iters is None:
            meaning |= {"trainer.steps", "actor.num_mini_batches"}  # which then say how long it decays
    if config.needs_rollouts:
        meaning |= set(PROMPTS)
    saved, now = read_trainer_state(checkpoint).get("data"), data_of(config)
    if saved and now and saved != now:
        raise InputError(
            f"{checkpoint} was written with another content of data.train={config.data.train} ({saved['rows']} rows, "
            f"now {now['rows']}, or other ones), in whose order its prompts are counted; give it back what it had, or "
            "begin anew with run_dir=..."
        )
    keys = [key for key in differing_keys(checkpoint / "config.yaml", config) if key in meaning]
    if keys:
        raise ConfigError(
            f"{checkpoint} was written with another {', '.join(keys)}, on which the meaning of its state depends; take "
            "what its config.yaml has"
        )


def _refuse_another_configuration(run_dir: Path, config: Config) -> None:
    file = run_dir / "config.yaml"
    if file.is_file() and (keys := differing_keys(file, config)):
        raise ConfigError(
            f"{run_dir} holds a run with another configuration (different: {', '.join(keys)}); give this one its own "
            f"directory with run_dir=..., or move the old one aside with --resume never."
        )


def claim(config: Config, beginning: Beginning, held: ExitStack) -> tuple[Attempt, Beginning]:
    """Take the run directory for as long as `held` lasts, with a number of its own; write the configuration.

    Whoever had it when `begin` looked may have come further: then what it left is where this start begins. Damaged
    checkpoints that were passed over step aside, so that the new ones are the newest again.
    Errors: ConfigError where another start has it, or has finished the run. OutputError where nothing can be written.
    """
    with telling(Path(config.run_dir)):
        return _claim(config, beginning, held)


def _claim(config: Config, beginning: Beginning, held: ExitStack) -> tuple[Attempt, Beginning]:
    run_dir = Path(config.run_dir)
    lock(run_dir, held)
    attempt = Attempt.take(run_dir)  # from here on no other attempt completes a checkpoint
    if (run_dir / "summary.json").is_file():
        raise ConfigError(
            f"run_dir is {run_dir}, where another start has just finished the run; run again to see how"
        )
    for folder in (run_dir, run_dir / "checkpoints"):
        put_back(folder)
    for unfinished in (run_dir / "checkpoints").glob("*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    if checkpoints_of(run_dir)[-1:] != beginning.newest:
        beginning = begin(config, "auto")
    write_aside(run_dir / "config.yaml", to_yaml(config))
    return attempt, replace(beginning, notes=(*beginning.notes, *_set_aside(beginning, attempt)))


def _set_aside(beginning: Beginning, attempt: Attempt) -> Iterator[str]:
    for directory, problem in beginning.damaged:
        aside = directory.with_name(f"{directory.name}.damaged-{attempt.number}")
        directory.rename(aside)
        yield f"{directory} is damaged ({problem}), and is called {aside.name} now: {beginning.checkpoint} is used"


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, Damaged]:
    """The newest whole checkpoint, and the damaged ones that are newer. Errors: InputError where the newest that is not
    damaged is of another format."""
    damaged: list[tuple[Path, str]] = []
    for directory in reversed(checkpoints_of(run_dir)):
        if problem := damage(directory, FORMAT):
            damaged.append((directory, problem))
            continue
        return directory, tuple(damaged)
    return None, tuple(damaged)


def _said(damaged: Damaged) -> str:
    return ", ".join(f"{directory.name} is damaged ({problem})" for directory, problem in damaged)


def reference_directory(run_dir: Path) -> Path:
    """Where a run keeps the frozen policy of its KL term."""
    return run_dir / "reference"


def keep_reference(directory: Path, checkpoint: Path) -> None:
    """The reference of the run a checkpoint is of, in this run's `directory`: a copy where that was another run.

    Errors: InputError where there is none, or it is damaged.
    """
    # It brings torch along, which reports do without.
    from megatron_a3po.weights.hugging_face import FORMAT as WEIGHTS_FORMAT

    theirs = reference_directory(checkpoint.parent.parent)
    if not theirs.is_dir():
        raise InputError(
            f"{theirs} is not there, the policy that actor.kl_coef holds the target near: the run of {checkpoint} had "
            "no KL term; leave actor.kl_coef out, or start without that checkpoint"
        )
    if problem := damage(theirs, WEIGHTS_FORMAT):
        raise InputError(f"{theirs} is damaged ({problem}); copy it again from where the run was made")
    if theirs.resolve() != directory.resolve():
        with written_aside(directory) as aside:
            shutil.copytree(theirs, aside, dirs_exist_ok=True)


def data_of(config: Config) -> dict[str, Any] | None:
    """What data.train holds; None where no prompts are counted."""
    if not config.needs_rollouts:
        return None
    file = Path(config.data.train)
    with file.open("rb") as lines:
        return {"rows": sum(1 for line in lines if line.strip()), "sha256": checksum(file)}


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer.json").read_text())


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        path
        for path in (run_dir / "checkpoints").glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdecimal()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _checkpoint_at(path: Path) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint, or the latest one of a run directory, with notes on what was passed over."""
    if (path / MANIFEST).is_file():
        if problem := damage(path, FORMAT):
            raise InputError(f"--resume {path}: {problem}; take an earlier checkpoint")
        return path, ()
    checkpoint, damaged = latest_checkpoint(path)
    if checkpoint is None:
        there = f" ({_said(damaged)})" if damaged else ""
        raise InputError(
            f"--resume {path}: no whole checkpoint there{there}; give a checkpoint or a run directory with one"
        )
    notes = (f"{one} is damaged ({problem}): {checkpoint} is used" for one, problem in damaged)
    return checkpoint, tuple(notes)
