"""Sequence-level ratios and the terms beside the clipped loss, through the production command, against plain numpy.

As in `test_metrics_by_numpy`: log-probs come from `transformers` in float64, g from the weights the step began with,
t of mini-batch 2 from those the first update left, which a run on the first half of the batch exports.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.trainer.batch import Batch, batch_path, load_batch, save_batch
from tests.trainer.numpy_metrics import UPDATE, anchors, grpo, per_token, responses
from tests.trainer.replay import NUM_GROUPS, Replays, identical
from tests.trainer.test_metrics_by_numpy import logp_and_entropy

Vector = np.ndarray
EPS = 0.05  # a mean over a sequence's tokens stays near 1
CAP = 1.1
SEQUENCE_RATIO = [
    "actor.importance_ratio=sequence",
    f"actor.eps_low={EPS}",
    f"actor.eps_high={EPS}",
    f"actor.behave_weight_cap={CAP}",
]


@dataclass(frozen=True)
class Case:
    """One way to train."""

    anchor: str
    ratio: str = "sequence"
    mean: str = "sequence"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    overrides: list[str] = field(default_factory=list)

    def switches(self) -> list[str]:
        method = (
            ["actor.use_decoupled_loss=false"]
            if self.anchor == "rollout"
            else [f"actor.prox_logp_method={self.anchor}"]
        )
        return [
            *method,
            *SEQUENCE_RATIO,
            f"actor.importance_ratio={self.ratio}",
            f"actor.loss_mean={self.mean}",
            f"actor.entropy_coef={self.entropy_coef}",
            f"actor.kl_coef={self.kl_coef}",
            *self.overrides,
        ]


CASES = {
    "coupled": Case("rollout"),
    "loglinear": Case("loglinear"),
    "linear": Case("linear", mean="token"),
    "recompute": Case("recompute", mean="constant"),
    "weight masked": Case("loglinear", overrides=["actor.behave_weight=mask"]),
    "entropy bonus": Case("loglinear", "token", "sequence", entropy_coef=0.3),
    "near the reference": Case("loglinear", "token", "sequence", kl_coef=3.0),
    "everything": Case("recompute", "sequence", "token", entropy_coef=0.1, kl_coef=3.0),
}
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def batch(replays: Replays) -> dict[str, Vector]:
    with np.load(batch_path(replays.folder / "batches", 1)) as file:
        return dict(file)


@pytest.fixture(scope="module")
def first_half(replays: Replays) -> Path:
    """A batch of the first mini-batch alone."""
    whole = load_batch(batch_path(replays.folder / "batches", 1))
    folder = replays.folder / "first-mini-batch"
    save_batch(batch_path(folder, 1), Batch(whole.groups[: NUM_GROUPS // 2], whole.version))
    return folder


@dataclass(frozen=True)
class Scored:
    """Of every response token of the batch: target, step's first weights, entropy, mini-batch and sequence."""

    t: Vector
    g: Vector
    entropy: Vector
    part: Vector
    sequence: Vector


def scored(replays: Replays, batch: dict[str, Vector], after_first: Path) -> Scored:
    g, entropy = logp_and_entropy(replays.folder / "model", batch)
    numbers = np.arange(len(batch["lengths"]))
    part = per_token(batch, numbers * 2 // len(numbers))
    later = logp_and_entropy(after_first, batch)
    t, entropy = np.where(part, later[0], g), np.where(part, later[1], entropy)
    return Scored(t, g, entropy, part, per_token(batch, numbers))


def on_paper(case: Case, batch: dict[str, Vector], found: Scored) -> dict[str, float]:
    """Loss and the statistics of the ratio, in float64."""
    b = np.concatenate([batch["behave_logp"][s] for s in responses(batch)]).astype(np.float64)
    d = int(batch["current_version"]) - np.concatenate([batch["versions"][s] for s in responses(batch)])
    lengths = np.bincount(found.sequence)

    def averaged(values: Vector) -> Vector:
        means = np.bincount(found.sequence, values) / lengths
        return means[found.sequence] if case.ratio == "sequence" else values

    prox = {**anchors(b, found.t, d), "recompute": found.g}[case.anchor]
    ratio, weight = np.exp(averaged(found.t - prox)), np.exp(averaged(prox - b))
    advantage = per_token(batch, grpo(batch))
    plain, clipped = ratio * advantage, np.clip(ratio, 1 - EPS, 1 + EPS) * advantage
    capped = (
        np.where(weight <= CAP, weight, 0)
        if "actor.behave_weight=mask" in case.overrides
        else np.minimum(weight, CAP)
    )
    # In a run's first step the reference is what the step began with.
    away = np.exp(found.g - found.t) - 1 - (found.g - found.t)
    loss = -capped * np.minimum(plain, clipped) - case.entropy_coef * found.entropy + case.kl_coef * away
    values = {
        "loss": np.mean([mean_of(loss, found, lengths, case.mean, one) for one in (0, 1)]),
        f"{UPDATE}/importance_weight/avg": ratio.mean(),
        f"{UPDATE}/importance_weight/min": ratio.min(),
        f"{UPDATE}/importance_weight/max": ratio.max(),
        f"{UPDATE}/behave_imp_weight/avg": weight.mean(),
        f"{UPDATE}/behave_imp_weight/max": weight.max(),
        f"{UPDATE}/clipped_tokens": np.sum(clipped < plain),
        f"{UPDATE}/clip_ratio": np.mean(clipped < plain),
        f"{UPDATE}/entropy/avg": found.entropy.mean(),
    }
    if case.kl_coef:
        values[f"{UPDATE}/reference_kl/avg"] = away.mean()
    return {name: float(value) for name, value in values.items()}


def mean_of(loss: Vector, found: Scored, lengths: Vector, mean: str, part: int) -> float:
    here = found.part == part
    num_sequences = len(np.unique(found.sequence[here]))
    match mean:
        case "token":
            return loss[here].mean()
        case "sequence":
            return (loss / lengths[found.sequence])[here].sum() / num_sequences
        case _:
            return loss[here].sum() / (num_sequences * 16)


@cases
def test_a_step_is_the_one_on_paper(
    replays: Replays, batch: dict[str, Vector], first_half: Path, name: str
) -> None:
    case = CASES[name]
    switches = case.switches()
    replays.run(
        f"objective-{name}-half",
        *switches,
        f"trainer.replay={first_half}",
        f"trainer.prompts_per_step={NUM_GROUPS // 2}",
    )
    (row,), _ = replays.run(f"objective-{name}", *switches, "actor.num_mini_batches=2")
    found = scored(replays, batch, replays.folder / f"objective-{name}-half" / "export")
    assert np.abs(found.t - found.g)[found.part == 1].mean() > 0.01
    expected = on_paper(case, batch, found)
    assert expected[f"{UPDATE}/clipped_tokens"] > 10  # else neither the clip nor what it counts would show
    wrong = {
        key: (row[key], value)
        for key, value in expected.items()
        if abs(row[key] - value) > (1e-5 if key.endswith(("/min", "/max")) else 2e-6) * max(abs(value), 1.0)
    }
    assert not wrong
    assert (f"{UPDATE}/reference_kl/avg" in row) == (case.kl_coef > 0)
    forwards = (1.5 if case.anchor == "recompute" else 1.0) + (case.kl_coef > 0)
    assert row["forwards_per_token"] == pytest.approx(forwards, abs=0.1)


def test_measuring_or_forcing_the_pass_changes_no_weight_of_a_sequence_ratio(replays: Replays) -> None:
    switches = [*SEQUENCE_RATIO, "actor.loss_mean=sequence", "actor.num_mini_batches=2", "trainer.steps=2"]
    honest_rows, honest = replays.run("sequence-recompute", *switches)
    for name, more in (
        ("metrics", ["actor.prox_logp_method=metrics"]),
        ("forced", ["actor.recompute_every_token=true"]),
    ):
        rows, weights = replays.run(f"sequence-{name}", *switches, *more)
        assert identical(weights, honest)
        assert [row["loss"] for row in rows] == [row["loss"] for row in honest_rows]
    _, by_token = replays.run("token-recompute", *switches, "actor.importance_ratio=token")
    assert not identical(by_token, honest)


def test_with_one_mini_batch_a_sequences_own_ratio_is_exactly_one(replays: Replays) -> None:
    (row,), _ = replays.run("sequence-one", *SEQUENCE_RATIO, "actor.loss_mean=sequence")
    parts = [row[f"{UPDATE}/importance_weight/{part}"] for part in ("avg", "min", "max")]
    assert parts == [1.0, 1.0, 1.0]
    assert row[f"{UPDATE}/clipped_tokens"] == 0


def test_an_entropy_bonus_keeps_the_entropy_up(replays: Replays) -> None:
    steps = ["trainer.steps=4", "actor.num_mini_batches=2", "actor.prox_logp_method=loglinear"]
    plain, _ = replays.run("bonus-none", *steps)
    bonus, _ = replays.run("bonus-large", *steps, "actor.entropy_coef=2")
    last = [rows[-1][f"{UPDATE}/entropy/avg"] for rows in (plain, bonus)]
    assert last[1] > last[0]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in bonus)
