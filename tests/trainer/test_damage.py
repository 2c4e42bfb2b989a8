"""What a start makes of a run directory whose files are damaged: of its checkpoints, and of the small ones beside them.

A whole run that goes on from the checkpoint before: test_resume.py.
"""

import dataclasses
import errno
import fcntl
import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.config import Config, load_config, read_model_shape, to_yaml
from megatron_a3po.errors import ConfigError, InputError
from megatron_a3po.trainer import recovery
from megatron_a3po.trainer.attempt import Attempt, lock, newest_attempt
from megatron_a3po.trainer.recovery import FORMAT, begin, claim, data_of
from megatron_a3po.trainer.saving import Checkpoint
from megatron_a3po.weights.manifest import MANIFEST, write_manifest
from tests.trainer.replay import Replays


@pytest.fixture
def config(replays: Replays, tmp_path: Path) -> Config:
    return load_config(replays.config, [f"run_dir={tmp_path / 'run'}", "trainer.steps=20"], check_files=False)


def with_checkpoints(config: Config, *steps: int, format_number: int = FORMAT) -> Path:
    """A run directory with what a start looks at."""
    run_dir = Path(config.run_dir)
    for step in steps:
        folder = run_dir / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        shape = dataclasses.asdict(read_model_shape(config.model.hf_path))
        (folder / "model.json").write_text(json.dumps(shape))
        (folder / "config.yaml").write_text(to_yaml(config))
        state = {"attempt": 1, "step": step, "data": data_of(config)}
        (folder / "trainer.json").write_text(json.dumps(state))
        (folder / "part").write_text("weights")
        write_manifest(folder, format_number)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return run_dir


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def break_a_read(checkpoint: Path) -> None:
    """A file that fails as it is read, though not before, as on a bad block."""
    (checkpoint / "part").unlink()
    (checkpoint / "part").symlink_to("/proc/self/mem")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["part"]["bytes"] = 0
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def manifest_of(text: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / MANIFEST).write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bad block": (break_a_read, "part cannot be read (Input/output error)"),
    "no manifest": (lambda one: (one / MANIFEST).unlink(), "manifest.json cannot be read (No such file"),
    "an empty one": (manifest_of(""), "manifest.json: "),
    "of another shape": (manifest_of("[]"), "manifest.json lists no files"),
    "null": (manifest_of("null"), "manifest.json lists no files"),
    "half of one": (manifest_of('{"format": 2}'), "manifest.json lists no files"),
    "of nothing": (manifest_of('{"format": 2, "files": {}}'), "manifest.json lists no files"),
    "without checksums": (
        manifest_of('{"format": 2, "files": {"part": {"bytes": 7}}}'),
        "manifest.json lists no",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_steps_aside_and_the_one_before_it_is_used(config: Config, name: str) -> None:
    run_dir, (damage, said) = with_checkpoints(config, 3, 9, 10), DAMAGES[name]
    for step in (9, 10):
        damage(run_dir / "checkpoints" / f"step-{step}")
    with ExitStack() as held:
        _, beginning = claim(config, begin(config, "auto"), held)
    assert beginning.checkpoint == run_dir / "checkpoints" / "step-3"
    newest, before = beginning.notes
    assert newest.startswith(f"{run_dir}/checkpoints/step-10 is damaged ({said}")
    assert newest.endswith(f"is called step-10.damaged-1 now: {beginning.checkpoint} is used")
    assert "step-9.damaged-1" in before
    assert names(run_dir) == ["step-10.damaged-1", "step-3", "step-9.damaged-1"]
    assert begin(config, "auto").notes == (), "said once"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(config: Config) -> None:
    run_dir = with_checkpoints(config, 9, 10)
    for step in (9, 10):
        (run_dir / "checkpoints" / f"step-{step}" / "part").write_text("weighty")
    there = names(run_dir)
    for resume in ("auto", str(run_dir)):
        with pytest.raises(
            InputError, match=r"no whole checkpoint: step-10 is damaged .* step-9 .*--resume never"
        ):
            begin(config, resume)
    other = config.model_copy(update={"run_dir": f"{run_dir}-2"})
    with pytest.raises(InputError, match=r"--resume .*run: no whole checkpoint there \(step-10 is damaged"):
        begin(other, str(run_dir))
    assert names(run_dir) == there
    (run_dir / "config.yaml").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        begin(config, "auto")
    assert begin(config, "never").kind == "new"


def test_another_format_is_no_damage(config: Config) -> None:
    """A newer program's checkpoint is not passed over for an older one."""
    run_dir = with_checkpoints(config, 3)
    with_checkpoints(config, 9, format_number=FORMAT + 1)
    there = names(run_dir)
    for resume in ("auto", str(run_dir / "checkpoints" / "step-9")):
        with pytest.raises(InputError, match=rf"step-9 is in format {FORMAT + 1}, .* reads format {FORMAT}"):
            begin(config, resume)
    assert names(run_dir) == there


def test_prompts_are_counted_in_one_file(config: Config, tmp_path: Path) -> None:
    """Another content is refused where prompts are drawn; a replay has none."""
    train = tmp_path / "train.jsonl"
    train.write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "1+2=", "answer": "3"}\n')
    data = config.data.model_copy(update={"train": str(train)})
    trainer = config.trainer.model_copy(update={"replay": None})
    live = config.model_copy(update={"data": data, "trainer": trainer})
    run_dir = with_checkpoints(live, 3)
    assert begin(live, "auto").kind == "continue"
    train.write_text('{"prompt": "1+2=", "answer": "3"}\n')
    for one, resume in ((live, "auto"), (live.model_copy(update={"run_dir": f"{run_dir}-2"}), str(run_dir))):
        with pytest.raises(InputError, match=r"step-3 was .* of data\.train=.*train\.jsonl \(2 rows, now 1"):
            begin(one, resume)
    replayed = config.model_copy(update={"data": data, "run_dir": f"{run_dir}-3"})
    assert begin(replayed, str(run_dir)).kind == "continue"


def test_what_has_just_been_completed_is_kept_whatever_else_is_there(config: Config) -> None:
    run_dir = with_checkpoints(config, 1, 2, 3, 4, 9, 10)
    newest = Checkpoint(Attempt(run_dir, 1), 4)
    newest.forget_older(keep_last=2, keep_every=None)
    assert names(run_dir) == ["step-10", "step-3", "step-4", "step-9"]
    newest.forget_older(keep_last=1, keep_every=None)
    assert names(run_dir) == ["step-10", "step-4", "step-9"]


def test_an_old_checkpoint_loses_its_name_before_its_files(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = with_checkpoints(config, 1, 2)
    folder = run_dir / "checkpoints"
    (folder / "step-1.removed.tmp").mkdir()
    (folder / "step-1.removed.tmp" / "left by a killed writer").touch()
    rmtree, seen = shutil.rmtree, []

    def watched(path: Path, **options: Any) -> None:
        seen.append(path.name)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    Checkpoint(Attempt(run_dir, 1), 2).forget_older(keep_last=1, keep_every=None)
    assert names(run_dir) == ["step-2"]
    assert set(seen) == {"step-1.removed.tmp"}


def test_small_files_that_a_power_failure_has_emptied(config: Config) -> None:
    run_dir = with_checkpoints(config, 3)
    assert Attempt.take(run_dir).number == 1
    (run_dir / "attempt").write_text("")
    assert newest_attempt(run_dir) == 1
    assert Attempt.take(run_dir).number == 2
    for text in ("", "[]"):
        (run_dir / "summary.json").write_text(text)
        with pytest.raises(InputError, match=r"summary\.json is .*remove it"):
            begin(config, "auto")


def test_a_file_system_without_locks_is_no_run_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with ExitStack() as first:
        lock(tmp_path, first)
        with ExitStack() as second, pytest.raises(ConfigError, match=r"under way \(pid \d+ on \S+\)"):
            lock(tmp_path, second)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), ExitStack() as held:
        lock(tmp_path, held)
    assert "cannot be locked (Function not implemented)" in caplog.text


def test_a_run_directory_that_cannot_be_written_is_refused(config: Config) -> None:
    """Before there is a log to say it in."""
    run_dir = with_checkpoints(config, 3)
    mounted = subprocess.run(
        ["mount", "--bind", str(run_dir), str(run_dir)], capture_output=True, check=False
    )
    if mounted.returncode:
        run_dir.chmod(0o500)
    else:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(run_dir)], check=True)
    try:
        with pytest.raises(ConfigError, match=r"run_dir is .*(cannot be made|nothing can be written)"):
            begin(config, "auto")
    finally:
        if mounted.returncode:
            run_dir.chmod(0o700)
        else:
            subprocess.run(["umount", "--lazy", str(run_dir)], check=True)
    assert recovery.begin(config, "auto").kind == "continue"
