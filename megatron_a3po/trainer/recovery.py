"""A run directory's past: what it holds, whether this start may continue it, and the checkpoints it continues from.

    checkpoints/step-<n>/     complete when, and only when, the name has no suffix
        actor/                model, optimizer, schedule (actor/checkpoint.py)
        trainer.json          step and version, the configuration's hash
        rollouts.pickle       prompt cursor, prompts in flight, finished groups (rollout/client.py)
        config.yaml           the configuration it was written under
        manifest.json         format number, sizes and checksums of the files above

There is no random state to keep: prompts, samples and shuffles are functions of (seed, position).
"""

import hashlib
import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_a3po.config import Config, to_yaml
from megatron_a3po.config.difference import differing_keys
from megatron_a3po.errors import ConfigError, InputError

FORMAT = 1
PREFIX = "step-"


@dataclass(frozen=True)
class Beginning:
    """How this start goes on from what the run directory holds."""

    kind: Literal["new", "continue", "finished"]
    attempt: int = 1
    checkpoint: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)  # of a finished run
    notes: tuple[str, ...] = ()  # what a person should know, said once there is a log


def begin(config: Config, resume: str) -> Beginning:
    """Decide what to do with `run_dir` and claim it. Errors: ConfigError (another configuration), InputError (no
    checkpoint at PATH). Touches nothing but the run directory's name, under `--resume never`."""
    run_dir = Path(config.run_dir)
    if resume not in ("auto", "never"):
        checkpoint, notes = _checkpoint_at(Path(resume))
        _refuse_another_configuration(run_dir, config)
        return Beginning("continue", _next_attempt(run_dir), checkpoint, notes=notes)
    if resume == "never" and run_dir.exists():
        aside = next(
            path
            for n in range(1, 10_000)
            if not (path := run_dir.with_name(f"{run_dir.name}.old-{n}")).exists()
        )
        run_dir.rename(aside)
        return Beginning("new", notes=(f"moved the old run to {aside}",))
    if not (run_dir / "config.yaml").is_file():
        return Beginning("new")
    _refuse_another_configuration(run_dir, config)
    if (run_dir / "summary.json").is_file():
        summary = json.loads((run_dir / "summary.json").read_text())
        if summary["status"] == "done":
            return Beginning("finished", summary=summary)
    checkpoint, notes = latest_checkpoint(run_dir)
    return Beginning("continue", _next_attempt(run_dir), checkpoint, notes=notes)


def _refuse_another_configuration(run_dir: Path, config: Config) -> None:
    file = run_dir / "config.yaml"
    if file.is_file() and (keys := differing_keys(file, config)):
        raise ConfigError(
            f"{run_dir} holds a run with another configuration (different: {', '.join(keys)}); give this one its own "
            f"directory with run_dir=..., or move the old one aside with --resume never."
        )


def claim(config: Config, attempt: int) -> None:
    """Write the resolved configuration and the attempt's number. Called once per start, by one process."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_aside(run_dir / "config.yaml", to_yaml(config))
    write_aside(run_dir / "attempt", str(attempt))


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest complete checkpoint, and a note on every damaged one that was passed over."""
    notes: list[str] = []
    for directory in reversed(_checkpoints(run_dir)):
        if problem := damage(directory):
            notes.append(f"{directory} is damaged ({problem}); the one before it is used")
            continue
        return directory, tuple(notes)
    return None, tuple(notes)


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None if it is whole."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')}, this program reads {FORMAT}"
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return f"{name} is missing or cut short"
        if _checksum(path) != expected["sha256"]:
            return f"{name} has another checksum"
    return None


class Checkpoint:
    """A checkpoint being written: made aside, filled by all ranks, completed by rank 0."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.final = run_dir / "checkpoints" / f"{PREFIX}{step}"
        self.aside = self.final.with_name(self.final.name + ".tmp")

    @property
    def actor_directory(self) -> Path:
        return self.aside / "actor"

    def open(self) -> None:
        """Rank 0, before any rank writes."""
        shutil.rmtree(self.aside, ignore_errors=True)
        self.actor_directory.mkdir(parents=True)

    def complete(self, config: Config, trainer: dict[str, Any], rollouts: dict[str, Any] | None) -> None:
        """Rank 0, after every rank has written: state, manifest, the final name, and old ones forgotten."""
        (self.aside / "config.yaml").write_text(to_yaml(config))
        (self.aside / "trainer.json").write_text(json.dumps(trainer))
        (self.aside / "rollouts.pickle").write_bytes(pickle.dumps(rollouts))
        files = [path for path in sorted(self.aside.rglob("*")) if path.is_file()]
        manifest = {
            "format": FORMAT,
            "files": {
                str(path.relative_to(self.aside)): {"bytes": path.stat().st_size, "sha256": _checksum(path)}
                for path in files
            },
        }
        (self.aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(self.final, ignore_errors=True)
        self.aside.rename(self.final)
        for old in _checkpoints(Path(config.run_dir))[: -config.trainer.keep_last]:
            shutil.rmtree(old, ignore_errors=True)


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer.json").read_text())


def read_rollout_state(checkpoint: Path) -> dict[str, Any] | None:
    return pickle.loads((checkpoint / "rollouts.pickle").read_bytes())


def write_aside(path: Path, text: str) -> None:
    """Write a small file so that whoever reads it sees all of it or the one before."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.rename(path)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        path
        for path in (run_dir / "checkpoints").glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _checkpoint_at(path: Path) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint, or the latest one of a run directory, with notes on what was passed over."""
    checkpoint, notes = (path, ()) if (path / "manifest.json").is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise InputError(
            [
                *notes,
                f"--resume {path}: no complete checkpoint there; give a checkpoint or a run directory with one",
            ]
        )
    if problem := damage(checkpoint):
        raise InputError(f"--resume {path}: {problem}; take an earlier checkpoint")
    return checkpoint, notes


def _next_attempt(run_dir: Path) -> int:
    path = run_dir / "attempt"
    return int(path.read_text()) + 1 if path.is_file() else 1


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
