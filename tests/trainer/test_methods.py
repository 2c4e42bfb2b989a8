"""The three switches through the production command, on replayed batches: forwards, weights and metrics of each."""

import numpy as np
import pytest

from megatron_a3po.algorithm.proximal import METHODS
from megatron_a3po.trainer.batch import Batch, batch_path, load_batch
from tests.trainer.replay import Replays, Rows, Weights, identical, without_times

SWITCHES = {
    "loglinear": ["actor.prox_logp_method=loglinear"],
    "linear": ["actor.prox_logp_method=linear"],
    "coupled": ["actor.use_decoupled_loss=false"],
    "recompute": ["actor.prox_logp_method=recompute"],
    "forced": ["actor.prox_logp_method=recompute", "actor.recompute_every_token=true"],
    "metrics": ["actor.prox_logp_method=metrics"],
    "forced metrics": ["actor.prox_logp_method=metrics", "actor.recompute_every_token=true"],
}
MINI_BATCHES = (1, 4)
CASES = [(name, n) for name in SWITCHES for n in MINI_BATCHES]
APPROXIMATION = "ppo_actor/update/compute_logp"
ERRORS = (
    "abs_error",
    "squared_error",
    "rel_error",
    "behave_imp_weight_abs_error",
    "behave_imp_weight_rel_error",
    "importance_weight_abs_error",
    "importance_weight_rel_error",
)
STEPS = 3


@pytest.fixture(scope="module")
def runs(replays: Replays) -> dict[tuple[str, int], tuple[Rows, Weights]]:
    """Rows and weights of every switch with every number of mini-batches."""
    return {
        (name, n): replays.run(
            f"{name}-{n}", *SWITCHES[name], f"actor.num_mini_batches={n}", f"trainer.steps={STEPS}"
        )
        for name, n in CASES
    }


def num_tokens(batch: Batch, num_mini_batches: int) -> np.ndarray:
    """Tokens of each mini-batch, prompts included: what goes through the model."""
    sizes = [sum(len(t.tokens) for t in group.trajectories) for group in batch.groups]
    return np.array(sizes).reshape(num_mini_batches, -1).sum(axis=1)


def forwards_by_the_book(name: str, batch: Batch, n: int) -> float:
    """What each method costs by docs/metrics.md, in forwards of the whole batch."""
    tokens = num_tokens(batch, n)
    match name:
        case "forced" | "forced metrics":
            return 2.0
        case "recompute" | "metrics":
            return 1.0 + tokens[1:].sum() / tokens.sum()
        case _:
            return 1.0


@pytest.mark.parametrize(("name", "n"), CASES)
def test_forwards_per_token_are_those_of_the_method(runs, replays: Replays, name: str, n: int) -> None:
    rows, _ = runs[name, n]
    for row in rows:
        batch = load_batch(batch_path(replays.folder / "batches", row["step"]))
        assert row["forwards_per_token"] == pytest.approx(forwards_by_the_book(name, batch, n), abs=1e-12)
        if name == "recompute" and n == 4:
            assert row["forwards_per_token"] == pytest.approx(1.75, abs=0.1)


@pytest.mark.parametrize("name", ["recompute", "forced", "loglinear"])
def test_a_second_pipeline_stage_counts_no_token_twice(runs, replays: Replays, name: str) -> None:
    rows, _ = replays.run(
        f"{name}-pp2",
        *SWITCHES[name],
        "actor.num_mini_batches=4",
        "trainer.steps=1",
        "actor.pipeline_model_parallel_size=2",
    )
    assert rows[0]["forwards_per_token"] == runs[name, 4][0][0]["forwards_per_token"]


@pytest.mark.parametrize("n", MINI_BATCHES)
@pytest.mark.parametrize("other", ["forced", "metrics", "forced metrics"])
def test_the_same_weights_as_recompute_to_the_last_bit(runs, other: str, n: int) -> None:
    rows, weights = runs[other, n]
    honest_rows, honest = runs["recompute", n]
    assert identical(weights, honest)
    shared = [
        {name: value for name, value in row.items() if name in honest_row and name != "forwards_per_token"}
        for row, honest_row in zip(without_times(rows), honest_rows, strict=True)
    ]
    honest_rows = without_times(honest_rows)
    assert shared == [
        {name: value for name, value in row.items() if name != "forwards_per_token"} for row in honest_rows
    ]


def test_methods_differ(runs) -> None:
    """Clipping is active in these batches, so that equal weights above mean something."""
    for one, other in (("recompute", "loglinear"), ("loglinear", "linear"), ("loglinear", "coupled")):
        assert not identical(runs[one, 4][1], runs[other, 4][1])
    for name in ("loglinear", "linear", "coupled", "recompute"):
        assert all(row["ppo_actor/update/clipped_tokens"] > 0 for row in runs[name, 4][0])


@pytest.mark.parametrize("name", ["recompute", "forced", "metrics", "forced metrics"])
def test_with_one_mini_batch_every_ratio_is_exactly_one(runs, name: str) -> None:
    for row in runs[name, 1][0]:
        ratios = [row[f"ppo_actor/update/importance_weight/{part}"] for part in ("avg", "min", "max")]
        assert ratios == [1.0, 1.0, 1.0]
        assert row["ppo_actor/update/clipped_tokens"] == 0


def test_coupled_measures_the_behaviour_as_its_anchor(runs) -> None:
    for row in runs["coupled", 4][0]:
        weights = [row[f"ppo_actor/update/behave_imp_weight/{part}"] for part in ("avg", "min", "max")]
        assert weights == [1.0, 1.0, 1.0]
        assert row["ppo_actor/update/importance_weight/max"] > 1.2


@pytest.mark.parametrize(("name", "n"), CASES)
def test_each_mode_has_its_columns_and_no_others(runs, name: str, n: int) -> None:
    measured = METHODS if "metrics" in name else (name,) if name in METHODS else ()
    expected = {
        f"{APPROXIMATION}/{method}/{column}/avg"
        for method in measured
        for column in ("approx_logp", "behave_imp_weight", "importance_weight")
    }
    if "metrics" in name:
        expected |= {f"{APPROXIMATION}/{method}/{column}/avg" for method in METHODS for column in ERRORS}
    if name != "coupled":
        expected.add(f"{APPROXIMATION}/prox_logp_gt/avg")
    for row in runs[name, n][0]:
        assert {key for key in row if key.startswith(APPROXIMATION)} == expected
        assert row["sampler_trainer/tokens"] > 0


def test_the_rollout_anchor_of_the_metrics_is_the_behaviour(runs) -> None:
    for row in runs["metrics", 4][0]:
        assert row[f"{APPROXIMATION}/rollout/behave_imp_weight/avg"] == 1.0
        approximate, exact = (
            row[f"{APPROXIMATION}/{method}/abs_error/avg"] for method in ("loglinear", "rollout")
        )
        assert 0 < approximate < exact
