"""How a start refuses what it cannot go on from: exit 2 and one sentence that names the key or the path."""

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.trainer.batch import batch_path
from tests.trainer.replay import Replays


def test_a_run_directory_in_use_is_refused(replays: Replays) -> None:
    run_dir = replays.folder / "in-use"
    run_dir.mkdir()
    with (run_dir / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = replays.ended("in-use")
    assert ended.code == 2
    assert "run_dir" in ended.output
    assert "4711" in ended.output
    assert "Traceback" not in ended.output
    assert replays.ended("in-use").code == 0


@pytest.mark.parametrize("run_dir", ["/proc/no/such/place", "{file}", "{file}/below"])
def test_an_unusable_run_directory_is_refused(replays: Replays, tmp_path: Path, run_dir: str) -> None:
    file = tmp_path / "a file"
    file.touch()
    ended = replays.ended("unusable", f"run_dir={run_dir.format(file=file)}")
    assert ended.code == 2
    assert "run_dir" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.prompts_per_step=3", "trainer.prompts_per_step"),
        ("rollout.samples_per_prompt=3", "rollout.samples_per_prompt"),
    ],
)
def test_a_batch_of_another_shape_is_refused(replays: Replays, override: str, key: str) -> None:
    ended = replays.ended(f"another-shape-{key}", override)
    assert ended.code == 2
    assert key in ended.output
    assert str(batch_path(replays.folder / "batches", 1)) in ended.output
    assert "Traceback" not in ended.output


def test_a_checkpoint_of_another_model_or_beyond_the_run_is_refused(replays: Replays, tmp_path: Path) -> None:
    replays.run("two-steps", "trainer.steps=2", "trainer.save_every=1")
    checkpoint = replays.folder / "two-steps" / "checkpoints" / "step-2"
    beyond = replays.ended("beyond", "trainer.steps=1", "--resume", str(checkpoint))
    assert beyond.code == 2
    assert "trainer.steps=1" in beyond.output

    shutil.copytree(replays.folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1, "layer_types": None}))
    other = replays.ended(
        "other-model", f"model.hf_path={tmp_path / 'model'}", "trainer.steps=2", "--resume", str(checkpoint)
    )
    assert other.code == 2
    assert "model.hf_path" in other.output
    assert "num_layers" in other.output


def test_a_run_that_began_at_a_path_goes_on_from_its_own_checkpoint(replays: Replays) -> None:
    replays.run("began", "trainer.steps=1", "trainer.save_every=1")
    from_there = str(replays.folder / "began" / "checkpoints" / "step-1")
    options = ("trainer.steps=3", "trainer.save_every=1", "--resume", from_there)
    rows, _ = replays.run("goes-on", *options)
    assert [row["step"] for row in rows] == [2, 3]
    (replays.folder / "goes-on" / "summary.json").unlink()
    rows, _ = replays.run("goes-on", *options)
    assert [row["attempt"] for row in rows] == [1, 1], "nothing was trained again"
    assert np.isfinite(rows[-1]["loss"])
