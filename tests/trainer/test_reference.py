"""The KL term's frozen reference over the life of a run: which policy it is, and that every start has the same one."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainer.numpy_metrics import UPDATE
from tests.trainer.replay import Replays, Rows, Weights, exported, identical, without_times

STEPS, SAVED = 3, "trainer.save_every=2"
KL = f"{UPDATE}/reference_kl/avg"
METHOD = ["actor.prox_logp_method=loglinear", "actor.num_mini_batches=2"]
SWITCHES = [*METHOD, f"trainer.steps={STEPS}", "actor.kl_coef=0.5"]
LAYOUT = ["actor.tensor_model_parallel_size=2", "actor.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def straight(replays: Replays) -> tuple[Rows, Weights]:
    return replays.run("near-reference", *SWITCHES, SAVED)


def test_the_reference_is_the_policy_the_steps_begin_with(replays: Replays, straight) -> None:
    kept, begun = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (replays.folder / "near-reference" / "reference", replays.folder / "model")
    )
    assert identical(kept, begun)


def test_the_policy_moves_away_but_less_than_without_the_term(replays: Replays, straight) -> None:
    rows, _ = straight
    distances = [row[KL] for row in rows]
    assert all(distance > 0 for distance in distances)
    assert all(row["forwards_per_token"] == 2 for row in rows)
    loose, _ = replays.run("loose", *SWITCHES, "actor.kl_coef=1e-30")
    assert loose[-1][KL] > distances[-1]
    plain_rows, plain = replays.run("no-reference", *SWITCHES, "actor.kl_coef=0")
    # A term too small for any sum to notice: then all that is left of the pass is what it must not leave.
    assert identical(replays.weights("loose"), plain)
    assert not any(KL in row for row in plain_rows)
    assert not (replays.folder / "no-reference" / "reference").exists()


def test_after_a_warm_start_it_is_what_that_left(replays: Replays) -> None:
    rows, _ = replays.run(
        "warm-reference",
        "actor.kl_coef=0.5",
        "warm_start={steps: 2, batch_size: 8, lr_warmup_iters: 1, lr: 1e-2}",
    )
    assert rows[0][KL] == 0.0  # one mini-batch, and the first: the reference is the policy itself, to the bit


def test_a_run_that_goes_on_has_the_same_reference(replays: Replays) -> None:
    name, switches = "near-reference-4-ranks", [*SWITCHES, *LAYOUT, SAVED]
    expected_rows, expected = replays.run(name, *switches)
    killed = replays.folder / f"{name}-killed"
    shutil.copytree(replays.folder / name, killed)
    shutil.rmtree(killed / "export")
    (killed / "summary.json").unlink()
    rows, weights = replays.run(killed.name, *switches)
    assert [row["attempt"] for row in rows] == [1, 1, 2]
    assert without_times(rows) == without_times(expected_rows)
    assert identical(weights, expected)

    elsewhere = f"{name}-elsewhere"
    ended = replays.ended(
        elsewhere, *switches, "--resume", str(replays.folder / name / "checkpoints" / "step-2")
    )
    assert ended.code == 0, ended.output
    assert without_times(replays.rows(elsewhere)) == without_times(expected_rows)[2:]
    assert identical(exported(replays.folder / elsewhere), expected)
    assert (replays.folder / elsewhere / "reference" / "manifest.json").is_file()


def test_a_checkpoint_without_a_reference_or_with_a_damaged_one_is_refused(
    replays: Replays, straight
) -> None:
    replays.run("without", *METHOD, "trainer.steps=2", SAVED)
    checkpoint = replays.folder / "without" / "checkpoints" / "step-2"
    ended = replays.ended("from-without", *SWITCHES, SAVED, "--resume", str(checkpoint))
    assert ended.code == 2
    assert "reference is not there, the policy that actor.kl_coef holds the target near" in ended.output
    assert "Traceback" not in ended.output

    damaged = replays.folder / "damaged-reference"
    shutil.copytree(replays.folder / "near-reference", damaged)
    (damaged / "summary.json").unlink()
    file: Path = next((damaged / "reference").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    ended = replays.ended(damaged.name, *SWITCHES, SAVED)
    assert ended.code == 2
    assert "has another checksum" in ended.output
