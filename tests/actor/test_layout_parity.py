"""The same batch and the same weights give the same run in every layout, through the production command.

One rank with the default micro-batches is the reference of its kind; what it reports is held against paper first.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.trainer.batch import Batch, batch_path, load_batch
from tests.actor.replay import Outcome, layout, policy_logp, read_model, replay

SMALL = ["actor.max_tokens_per_micro_batch=40"]
LAYOUTS = {
    "small micro-batches": SMALL,
    "tp 2": layout(tp=2),
    "tp 2 sp": layout(tp=2, sp=True),
    "pp 2": layout(pp=2),
    "pp 2 interleaved": layout(pp=2, vpp=2),
    "dp 2": layout(dp=2),
    "tp 2 pp 2": layout(tp=2, pp=2),
    "tp 2 pp 2 sp": layout(tp=2, pp=2, sp=True),
    "tp 2 dp 2": layout(tp=2, dp=2),
    "tp 2 dp 2 sp": layout(tp=2, dp=2, sp=True),
    "tp 2 pp 2 sp, small micro-batches": [*layout(tp=2, pp=2, sp=True), *SMALL],
    "tp 2 pp 2 sp, interleaved": layout(tp=2, pp=2, vpp=2, sp=True),
}
OVERLAPPED = [*layout(dp=2), "actor.overlap_grad_reduce=true", "actor.overlap_param_gather=true"]
KINDS = {
    "loglinear": [],
    "metrics": ["actor.prox_logp_method=metrics"],
    "sequence mean": ["actor.loss_mean=sequence"],
    "constant mean": ["actor.loss_mean=constant"],
    "sequence ratio": [
        "actor.importance_ratio=sequence",
        "actor.loss_mean=sequence",
        "actor.eps_low=0.03",
        "actor.eps_high=0.03",
    ],
    "entropy bonus": ["actor.entropy_coef=0.1"],
    "near a reference": ["actor.kl_coef=1"],
    "tied": [],
    "tied, near a reference": ["actor.kl_coef=1"],
}
CASES = [("loglinear", name, LAYOUTS[name]) for name in LAYOUTS]
CASES += [
    ("metrics", name, LAYOUTS[name]) for name in ("dp 2", "pp 2 interleaved", "tp 2 pp 2 sp", "tp 2 dp 2")
]
CASES += [("tied", name, LAYOUTS[name]) for name in ("tp 2 sp", "pp 2", "pp 2 interleaved", "tp 2 pp 2 sp")]
CASES += [
    (kind, "tp 2 dp 2 sp, small", [*LAYOUTS["tp 2 dp 2 sp"], *SMALL])
    for kind in ("sequence mean", "constant mean")
]
CASES += [
    (kind, name, LAYOUTS[name])
    for kind in ("sequence ratio", "entropy bonus", "near a reference")
    for name in ("tp 2 pp 2", "tp 2 pp 2 sp, small micro-batches", "tp 2 dp 2")
]
CASES += [
    ("tied, near a reference", "pp 2 interleaved", LAYOUTS["pp 2 interleaved"]),
    ("near a reference", "overlapped parameters", OVERLAPPED),
    ("loglinear", "overlapped parameters", OVERLAPPED),
    ("loglinear", "loss in chunks of 7", [*layout(tp=2), "actor.loss_chunk_tokens=7"]),
    ("loglinear", "recomputed activations", [*layout(tp=2), "actor.recompute_granularity=full"]),
    ("loglinear", "overlapped gradients", [*layout(dp=2), *SMALL, "actor.overlap_grad_reduce=true"]),
]

# Rounding, by what it rounds: of mean |loss_t|, of the norm, absolute, of max(|value|, LEAST).
LOSS, NORM, WEIGHTS, METRICS, LEAST = 2e-6, 5e-6, 1e-5, 1e-5, 1e-3


@dataclass(frozen=True)
class References:
    """The one-rank run of each kind, made when first asked for."""

    config: Path
    tied_config: Path
    made: dict[str, Outcome]

    def config_of(self, kind: str) -> Path:
        return self.tied_config if kind.startswith("tied") else self.config

    def __getitem__(self, kind: str) -> Outcome:
        if kind not in self.made:
            self.made[kind] = replay(self.config_of(kind), f"{kind}, one rank", *KINDS[kind])
        return self.made[kind]


@pytest.fixture(scope="module")
def references(config: Path, tied_config: Path) -> References:
    return References(config, tied_config, {})


@pytest.fixture(scope="module")
def losses(config: Path, model: Path) -> list[np.ndarray]:
    """loss_t of the first batch under the first weights, on paper: for each trajectory -w min(r A, clip(r) A) around
    the loglinear anchor, with transformers' log-probs."""
    batch = load_batch(batch_path(config.parent / "batches", 1))
    policy = read_model(model)
    found = []
    for trajectory, advantage in zip(batch.trajectories, _advantages(batch), strict=True):
        response = slice(trajectory.prompt_length, None)
        target = policy_logp(policy, trajectory.tokens)[trajectory.prompt_length - 1 :]
        behave = trajectory.behave_logp[response].astype(np.float64)
        share = 1 / np.maximum(batch.version - trajectory.versions[response], 1)
        anchor = share * behave + (1 - share) * target
        ratio, weight = np.exp(target - anchor), np.minimum(np.exp(anchor - behave), 5.0)
        found.append(-weight * np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage))
    return found


def _advantages(batch: Batch) -> np.ndarray:
    rewards = np.array([[t.reward for t in group.trajectories] for group in batch.groups], np.float64)
    spread = rewards.std(axis=1, ddof=1, keepdims=True)
    return ((rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-5)).flatten()


def test_the_batch_has_what_parity_is_about(references: References, config: Path, model: Path):
    batch = load_batch(batch_path(config.parent / "batches", 1))
    responses = [t.versions[t.prompt_length :] for t in batch.trajectories]
    assert len({len(t.tokens) for t in batch.trajectories}) > 10
    assert set(batch.version - np.concatenate(responses)) == set(range(6))
    assert sum(len(np.unique(versions)) > 1 for versions in responses) > 5
    one_rank = references["loglinear"]
    assert (one_rank.column("ppo_actor/update/clipped_tokens") > 5).all()
    moved = [(one_rank.weights[name] - start).abs() for name, start in read_model(model).state_dict().items()]
    assert np.median([float(tensor.median()) for tensor in moved]) > 1e-3  # 4 updates at a rate of 1e-3


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", ["one rank", "tp 2 dp 2 sp"])
def test_the_loss_is_the_one_on_paper(config: Path, losses: list[np.ndarray], mean: str, name: str):
    expected = {
        "token": np.concatenate(losses).mean(),
        "sequence": np.mean([loss.mean() for loss in losses]),
        "constant": np.concatenate(losses).sum() / (len(losses) * 24),
    }[mean]
    run = replay(
        config,
        f"{mean} mean, one update, {name}",
        f"actor.loss_mean={mean}",
        "actor.num_mini_batches=1",
        "trainer.steps=1",
        *LAYOUTS.get(name, []),
    )
    assert run.rows[0]["loss"] == pytest.approx(expected, abs=LOSS * scale_of(losses), rel=0)


@pytest.mark.parametrize(
    ("kind", "name", "overrides"), CASES, ids=[f"{kind}: {name}" for kind, name, _ in CASES]
)
def test_agrees_with_one_rank(
    references: References, losses: list[np.ndarray], kind: str, name: str, overrides: list[str]
):
    expected = references[kind]
    found = replay(references.config_of(kind), f"{kind}, {name}", *KINDS[kind], *overrides)
    reached = distances(found, expected, scale_of(losses))
    print(reached)
    bounds = {"loss": LOSS, "grad_norm": NORM, "weights": WEIGHTS, "metrics": METRICS}
    assert all(reached[what] <= bound for what, bound in bounds.items()), reached


def scale_of(losses: list[np.ndarray]) -> float:
    """mean |loss_t|: the loss itself is a difference of gains and losses, and near zero."""
    return float(np.abs(np.concatenate(losses)).mean())


def distances(found: Outcome, expected: Outcome, scale: float) -> dict[str, float]:
    """How far two runs are apart, each quantity in the unit its bound is in."""
    assert found.weights.keys() == expected.weights.keys()
    assert len(found.rows) == len(expected.rows)
    assert found.rows[0].keys() == expected.rows[0].keys()
    pairs = [
        (row[name], expected_row[name])
        for row, expected_row in zip(found.rows, expected.rows, strict=True)
        for name in expected_row
        if isinstance(expected_row[name], int | float)
        and not name.startswith(("time/", "memory/"))
        and name not in ("loss", "grad_norm")  # these have bounds of their own
    ]
    assert [row["staleness/histogram"] for row in found.rows] == [
        row["staleness/histogram"] for row in expected.rows
    ]
    loss, norm = expected.column("loss"), expected.column("grad_norm")
    return {
        "loss": float(np.abs(found.column("loss") - loss).max() / scale),
        "grad_norm": float(np.abs(found.column("grad_norm") / norm - 1).max()),
        "weights": max(
            float((found.weights[name] - tensor).abs().max()) for name, tensor in expected.weights.items()
        ),
        "metrics": max(abs(a - b) / max(abs(b), LEAST) for a, b in pairs),
    }
