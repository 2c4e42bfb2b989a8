"""Statistics merge exactly, and every reported metric is in the table and on its page."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.algorithm.metric_table import QUANTITIES, TABLE, as_markdown, report
from megatron_a3po.algorithm.policy_loss import decoupled_loss
from megatron_a3po.algorithm.proximal import METHODS
from megatron_a3po.algorithm.statistics import (
    Statistics,
    approximation_statistics,
    policy_statistics,
    recomputed_statistics,
    reference_statistics,
    sampler_statistics,
)

UPDATE, COMPUTE_LOGP = "ppo_actor/update", "ppo_actor/update/compute_logp"


def batch(num_tokens: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    behave = -3 * torch.rand(num_tokens, generator=generator)
    return {
        "behave_logp": behave,
        "logp": behave + 0.4 * torch.randn(num_tokens, generator=generator),
        "prox_logp": behave + 0.2 * torch.randn(num_tokens, generator=generator),
        "reference_logp": behave + 0.3 * torch.randn(num_tokens, generator=generator),
        "advantages": torch.randn(num_tokens, generator=generator),
        "entropy": torch.rand(num_tokens, generator=generator),
        "staleness": torch.randint(0, 9, (num_tokens,), generator=generator, dtype=torch.int32),
    }


def measured(b: dict[str, torch.Tensor]) -> Statistics:
    """Everything a step of `metrics` mode with a KL term measures."""
    fields = b["logp"], b["prox_logp"], b["behave_logp"]
    loss = decoupled_loss(*fields, b["advantages"], eps_low=0.2, eps_high=0.2)
    found = policy_statistics(loss, b["logp"], b["behave_logp"], b["entropy"])
    found = found.merge(sampler_statistics(b["logp"], b["behave_logp"], b["staleness"]))
    found = found.merge(recomputed_statistics(b["prox_logp"]))
    found = found.merge(reference_statistics(b["reference_logp"], b["logp"]))
    for method in METHODS:
        args = b["behave_logp"], b["logp"], b["staleness"], b["prox_logp"]
        found = found.merge(approximation_statistics(method, *args))
    return found


def by_numpy(b: dict[str, torch.Tensor]) -> dict[str, float]:
    """The same numbers, written out again independently, in float64."""
    n = {name: value.double().numpy() for name, value in b.items()}
    t, g, behave, advantage, d = (
        n[k] for k in ("logp", "prox_logp", "behave_logp", "advantages", "staleness")
    )
    r, w = np.exp(t - g), np.exp(g - behave)
    clipped = np.clip(r, 0.8, 1.2) * advantage < r * advantage
    fresh = np.abs(t - behave)[d == 0]
    values = {f"{UPDATE}/clipped_tokens": clipped.sum(), f"{UPDATE}/clip_ratio": clipped.mean()}
    for name, x in (("importance_weight", r), ("behave_imp_weight", w)):
        values |= {
            f"{UPDATE}/{name}/avg": x.mean(),
            f"{UPDATE}/{name}/min": x.min(),
            f"{UPDATE}/{name}/max": x.max(),
        }
    values |= {f"{UPDATE}/entropy/avg": n["entropy"].mean()}
    values |= {f"{UPDATE}/kl/avg": (np.exp(t - behave) - 1 - (t - behave)).mean()}
    away = n["reference_logp"] - t
    values |= {f"{UPDATE}/reference_kl/avg": (np.exp(away) - 1 - away).mean()}
    values |= {"sampler_trainer/abs_diff/avg": fresh.mean(), "sampler_trainer/abs_diff/max": fresh.max()}
    values |= {"sampler_trainer/tokens": len(fresh), f"{COMPUTE_LOGP}/prox_logp_gt/avg": g.mean()}
    alpha = 1 / np.maximum(d, 1)
    for method, a in {
        "loglinear": alpha * behave + (1 - alpha) * t,
        "linear": np.log(alpha * np.exp(behave) + (1 - alpha) * np.exp(t)),
        "rollout": behave,
    }.items():
        wa, ra = np.exp(a - behave), np.exp(t - a)
        columns = {
            "approx_logp": a,
            "behave_imp_weight": wa,
            "importance_weight": ra,
            "abs_error": np.abs(a - g),
            "squared_error": (a - g) ** 2,
            "rel_error": 100 * np.abs(a - g) / (np.abs(g) + 1e-8),
            "behave_imp_weight_abs_error": np.abs(wa - w),
            "behave_imp_weight_rel_error": 100 * np.abs(wa - w) / (w + 1e-8),
            "importance_weight_abs_error": np.abs(ra - r),
            "importance_weight_rel_error": 100 * np.abs(ra - r) / (r + 1e-8),
        }
        values |= {f"{COMPUTE_LOGP}/{method}/{name}/avg": x.mean() for name, x in columns.items()}
    return values


def test_every_metric_against_numpy():
    found, expected = report(measured(batch())), by_numpy(batch())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6, abs=1e-6), name


def test_table_and_code_measure_the_same_quantities():
    assert set(measured(batch()).names) == set(QUANTITIES)
    assert report(measured(batch())).keys() == {metric.name for metric in TABLE if metric.quantity}
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)


def test_the_page_is_the_table():
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == as_markdown(), "run python tools/write_metrics_page.py"


@given(cuts=st.lists(st.integers(0, 64), min_size=1, max_size=3), seed=st.integers(0, 5))
def test_micro_batches_merge_to_the_whole(cuts: list[int], seed: int):
    whole, bounds = batch(seed=seed), [0, *sorted(cuts), 64]
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in pairwise(bounds)]
    merged = measured(parts[0])
    for part in parts[1:]:
        merged = merged.merge(measured(part))
    one = measured(whole)
    assert merged.names == one.names
    # Not to the bit: torch's vectorised exp may round the tail of a vector differently.
    torch.testing.assert_close(merged.table, one.table, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged.table[:, 1], one.table[:, 1])


def test_ranks_merge_in_one_table_and_those_without_values_change_nothing():
    mine = measured(batch())
    empty = Statistics.empty((), "cpu")
    tables = torch.stack([empty.aligned(QUANTITIES).table, mine.aligned(QUANTITIES).table])
    assert report(Statistics.merged(QUANTITIES, tables)) == report(mine)
    assert report(empty.aligned(QUANTITIES)) == {}


def test_what_nobody_measured_is_absent_never_zero():
    b = batch()
    stale = b["staleness"].clamp(min=1)
    assert report(sampler_statistics(b["logp"], b["behave_logp"], stale)) == {}
    columns = report(approximation_statistics("linear", b["behave_logp"], b["logp"], stale)).keys()
    measured_columns = ("approx_logp", "behave_imp_weight", "importance_weight")
    assert columns == {f"{COMPUTE_LOGP}/linear/{column}/avg" for column in measured_columns}


def test_a_measured_quantity_must_have_a_place_in_the_packing():
    with pytest.raises(KeyError, match="surprise"):
        Statistics.of({"surprise": torch.ones(2)}).aligned(QUANTITIES)


def test_a_nan_is_seen():
    table = Statistics.of({"kl": torch.tensor([1.0, torch.nan])}).table[0]
    assert table.isnan().tolist() == [True, False, True, True]


def test_fresh_tokens_errors_are_the_same_for_all_methods():
    b = batch()
    b["staleness"].clamp_(max=1)
    columns = [
        approximation_statistics(method, b["behave_logp"], b["logp"], b["staleness"], b["prox_logp"]).table
        for method in METHODS
    ]
    assert torch.equal(columns[0], columns[1])
    assert torch.equal(columns[0], columns[2])
