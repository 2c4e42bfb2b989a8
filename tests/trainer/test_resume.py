"""Stop, checkpoint, resume, through the production command on replayed batches: the same bits as never stopped."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_a3po.trainer.batch import batch_path
from tests.trainer import command
from tests.trainer.checkpoints import read_plain, read_tensors
from tests.trainer.held import GOES_ON, hold_before
from tests.trainer.replay import Replays, Rows, Weights, exported, identical, logs_of, without_times

STEPS, EVERY = 12, 3
LAYOUTS = {
    "1 rank": [],
    "TP 2, PP 2": ["actor.tensor_model_parallel_size=2", "actor.pipeline_model_parallel_size=2"],
    "DP 2": ["actor.data_parallel_size=2"],
}
# A rate that changes at every step, and an anchor that needs the moments of both mini-batches right.
METHOD = [
    "actor.prox_logp_method=loglinear",
    "actor.num_mini_batches=2",
    "actor.lr=2e-4",
    "actor.lr_warmup_iters=4",
    "actor.lr_decay_style=cosine",
]


@pytest.fixture(scope="module")
def batches(replays: Replays) -> Path:
    """Enough steps to stop in the middle of them: the four batches over and over."""
    folder = replays.folder / "many-batches"
    folder.mkdir()
    for step in range(1, STEPS + 1):
        os.link(batch_path(replays.folder / "batches", (step - 1) % 4 + 1), batch_path(folder, step))
    return folder


def overrides(batches: Path, layout: str, *more: str) -> list[str]:
    return [
        f"trainer.replay={batches}",
        f"trainer.steps={STEPS}",
        f"trainer.save_every={EVERY}",
        *METHOD,
        *LAYOUTS[layout],
        *more,
    ]


@pytest.fixture(scope="module")
def straight(replays: Replays, batches: Path) -> dict[str, tuple[Rows, Weights]]:
    """Every layout's run from its first step to its last."""
    return {
        layout: replays.run(f"straight-{number}", *overrides(batches, layout))
        for number, layout in enumerate(LAYOUTS)
    }


def path_of(replays: Replays, layout: str) -> Path:
    """The straight run's directory."""
    return replays.folder / f"straight-{list(LAYOUTS).index(layout)}"


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer.json").read_text())["step"]


def num_rows(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("layout", "number"),
    [("1 rank", signal.SIGTERM), ("TP 2, PP 2", signal.SIGUSR1), ("DP 2", signal.SIGINT)],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    replays: Replays, batches: Path, straight, layout: str, number: signal.Signals
) -> None:
    name = f"stopped-{number.name}"
    run_dir = replays.folder / name
    argv = replays.argv(name, *overrides(batches, layout))
    running = command.fork(replays.folder / "out" / name, *argv, before=hold_before(6))
    running.wait_for(lambda: num_rows(run_dir) >= 5)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # as a terminal does it
    else:
        running.signal(number)
    ended = running.wait()
    assert ended.code == 75, ended.output
    assert "run again to continue" in ended.output
    stopped_at = num_rows(run_dir)
    assert 5 <= stopped_at < STEPS
    newest = run_dir / "checkpoints" / f"step-{stopped_at}"
    assert step_of(newest) == stopped_at
    assert not (run_dir / "summary.json").exists()

    rows, weights = replays.run(name, *overrides(batches, layout))
    assert [row["attempt"] for row in rows] == [1] * stopped_at + [2] * (STEPS - stopped_at)
    assert num_rows(run_dir) == STEPS
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == STEPS
    straight_rows, straight_weights = straight[layout]
    assert without_times(rows) == without_times(straight_rows)
    assert identical(weights, straight_weights)
    # Weights, moments, the schedule's and Adam's counts after the last step.
    mine, theirs = (
        one / "checkpoints" / f"step-{STEPS}" / "actor" for one in (run_dir, path_of(replays, layout))
    )
    assert identical(read_tensors(mine), read_tensors(theirs))
    assert read_plain(mine) == read_plain(theirs)


@pytest.mark.parametrize(
    ("saved", "resumed"), [("TP 2, PP 2", "1 rank"), ("1 rank", "TP 2, PP 2"), ("TP 2, PP 2", "DP 2")]
)
def test_another_layout_goes_on_to_rounding(
    replays: Replays, batches: Path, straight, saved: str, resumed: str
) -> None:
    name = f"resharded-{list(LAYOUTS).index(saved)}-{list(LAYOUTS).index(resumed)}"
    checkpoint = path_of(replays, saved) / "checkpoints" / f"step-{STEPS - EVERY}"
    ended = replays.ended(name, *overrides(batches, resumed), "--resume", str(checkpoint))
    assert ended.code == 0, ended.output
    rows = replays.rows(name)
    assert [row["step"] for row in rows] == list(range(STEPS - EVERY + 1, STEPS + 1))
    straight_rows, straight_weights = straight[saved]
    for row, other in zip(rows, straight_rows[-EVERY:], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-4)
    weights = exported(replays.folder / name)
    assert max((weights[key] - straight_weights[key]).abs().max() for key in weights) < 1e-4


def test_a_finished_run_shows_its_summary_again(replays: Replays, batches: Path, straight) -> None:
    run_dir = path_of(replays, "1 rank")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    ended = replays.ended(run_dir.name, *overrides(batches, "1 rank"))
    assert ended.code == 0, ended.output
    assert f"done: {STEPS} training steps" in ended.output
    assert str(run_dir / "export") in ended.output
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize("how", ["auto", "checkpoint"])
def test_another_configuration_is_refused_by_its_keys(
    replays: Replays, batches: Path, straight, how: str
) -> None:
    run_dir = path_of(replays, "1 rank")
    resume = "auto" if how == "auto" else str(run_dir / "checkpoints" / f"step-{STEPS}")
    ended = replays.ended(
        run_dir.name, *overrides(batches, "1 rank", "actor.lr=2e-3", "trainer.seed=4"), "--resume", resume
    )
    assert ended.code == 2
    assert "actor.lr" in ended.output
    assert "trainer.seed" in ended.output
    assert "run_dir=..." in ended.output
    assert "--resume never" in ended.output
    assert "Traceback" not in ended.output
    assert "actor.eps_low" not in ended.output


def test_never_moves_the_old_run_aside(replays: Replays, batches: Path) -> None:
    few = ["trainer.steps=2", f"trainer.replay={batches}"]
    _, first = replays.run("moved", *few)
    for attempt in (1, 2):
        rows, _ = replays.run("moved", *few, "actor.lr=5e-4", "--resume", "never")
        assert [row["attempt"] for row in rows] == [1, 1]
        assert (replays.folder / f"moved.old-{attempt}" / "summary.json").is_file()
    assert identical(exported(replays.folder / "moved.old-1"), first)
    assert not identical(exported(replays.folder / "moved"), first)
    rows, _ = replays.run("not-there-yet", *few, "--resume", "never")
    assert len(rows) == 2
    assert not (replays.folder / "not-there-yet.old-1").exists()


@pytest.mark.parametrize("what", ["nothing", "a file", "a run without checkpoints"])
def test_a_path_without_a_checkpoint_is_refused(replays: Replays, what: str) -> None:
    path = replays.folder / f"no-checkpoint-{what}".replace(" ", "-")
    if what == "a file":
        path.write_text("hello")
    elif what == "a run without checkpoints":
        path.mkdir()
    ended = replays.ended("from-nowhere", "--resume", str(path))
    assert ended.code == 2
    assert f"--resume {path}" in ended.output
    assert "Traceback" not in ended.output
    assert not (replays.folder / "from-nowhere").exists()


def test_the_last_checkpoints_are_kept(replays: Replays, batches: Path) -> None:
    few = ["trainer.steps=6", "trainer.save_every=1", "trainer.keep_last=3", f"trainer.replay={batches}"]
    replays.run("kept", *few)
    assert names(replays.folder / "kept" / "checkpoints") == ["step-4", "step-5", "step-6"]
    replays.run("from-a-run", *few, "--resume", str(replays.folder / "kept"))
    assert replays.rows("from-a-run") == []  # it had nothing left to do
    assert identical(replays.weights("from-a-run"), replays.weights("kept"))


DAMAGES = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "another checksum": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "missing": lambda file: file.unlink(),
    "lists no files": lambda file: (file.parent.parent / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(replays: Replays, batches: Path, straight, damage: str) -> None:
    run_dir = replays.folder / f"damaged-{damage}".replace(" ", "-")
    shutil.copytree(path_of(replays, "1 rank"), run_dir)
    shutil.rmtree(run_dir / "export")
    (run_dir / "summary.json").unlink()
    newest = run_dir / "checkpoints" / f"step-{STEPS}"
    (newest.parent / f"step-{STEPS + 4}.tmp").mkdir()
    file = max(newest.glob("actor/*.distcp"), key=lambda path: path.stat().st_size)
    DAMAGES[damage](file)
    ended = replays.ended(run_dir.name, *overrides(batches, "1 rank"))
    assert ended.code == 0, ended.output
    assert f"{newest} is damaged" in ended.output
    assert damage in ended.output
    assert newest.with_name(f"{newest.name}.damaged-2").is_dir()
    rows = replays.rows(run_dir.name)
    assert [row["attempt"] for row in rows] == [1] * (STEPS - EVERY) + [2] * EVERY
    assert without_times(rows) == without_times(straight["1 rank"][0])
    assert identical(exported(run_dir), straight["1 rank"][1])


def test_a_second_interrupt_ends_it_at_once(replays: Replays, batches: Path) -> None:
    run_dir = replays.folder / "interrupted"
    argv = replays.argv("interrupted", *overrides(batches, "TP 2, PP 2"))
    running = command.fork(replays.folder / "out" / "interrupted", *argv, before=hold_before(6, deaf=True))
    running.wait_for(lambda: num_rows(run_dir) >= 1)
    assert len(running.members()) >= 5
    os.killpg(running.pid, signal.SIGINT)
    running.wait_for(lambda: "ctrl-C again ends the run at once" in running.said())
    os.killpg(running.pid, signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("victim", ["the command", "a rank"])
def test_a_killed_process_takes_the_others_with_it(replays: Replays, batches: Path, victim: str) -> None:
    name = f"killed-{victim}".replace(" ", "-")
    run_dir = replays.folder / name
    argv = replays.argv(name, *overrides(batches, "TP 2, PP 2"))
    running = command.fork(replays.folder / "out" / name, *argv, before=hold_before(6))
    running.wait_for(lambda: num_rows(run_dir) >= 1)
    rank = max(pid for pid in running.members() if pid != running.pid)
    os.kill(running.pid if victim == "the command" else rank, signal.SIGKILL)
    (run_dir / GOES_ON).touch()
    ended = running.wait()  # which looks for what is left behind
    if victim == "a rank":
        assert ended.code == 3, ended.output
        assert "signal 9" in ended.output
        assert "rank-" in ended.output
    else:
        assert ended.code == -signal.SIGKILL
    rows, _ = replays.run(name, *overrides(batches, "TP 2, PP 2"))
    assert len(rows) == STEPS, logs_of(run_dir)


def test_the_real_command_answers_a_signal_with_75(replays: Replays, batches: Path) -> None:
    run_dir = replays.folder / "real"
    argv = replays.argv("real", *overrides(batches, "DP 2"))
    program = ("-m", "tests.trainer.held", "6", "megatron_a3po")
    running = command.spawn(replays.folder / "out" / "real", *argv, program=program)
    running.wait_for(lambda: num_rows(run_dir) >= 2)
    running.signal(signal.SIGTERM)
    assert running.wait().code == 75
    assert step_of(run_dir / "checkpoints" / f"step-{num_rows(run_dir)}") == num_rows(run_dir) < STEPS
