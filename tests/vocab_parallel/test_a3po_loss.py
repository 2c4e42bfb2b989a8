"""The one call for any trainer, and its statistics by staleness against numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_a3po.algorithm.policy_loss import TokenLoss
from megatron_a3po.algorithm.statistics import Statistics
from megatron_a3po.vocab_parallel import TrainedRows, a3po_loss
from megatron_a3po.vocab_parallel.a3po_loss import A3PO, STALENESS, staleness_statistics
from tests.vocab_parallel.problem import SEQUENCE_OBJECTIVES, random_problem, reference_answer

BOUNDS = {"0": (0, 0), "1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "more": (9, 10**9)}


def test_one_call_with_nothing_but_tensors():
    problem = replace(random_problem(vocab_size=56), objective=A3PO)
    mask = torch.zeros(len(problem.hidden), dtype=torch.bool).index_fill(0, problem.trained, True)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    found = a3po_loss(hidden, weight, TrainedRows.of_mask(mask), problem.fields)
    (found.loss / len(problem.trained)).backward()
    expected = reference_answer(problem)
    torch.testing.assert_close(found.loss, expected.loss.float())
    torch.testing.assert_close(found.logp, expected.logp.float())
    torch.testing.assert_close(found.entropy, expected.entropy.float())
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad * len(problem.trained), expected.hidden_grad.float())
    assert found.first_nonfinite.item() == -1
    rows = dict(zip(found.statistics.names, found.statistics.table.tolist(), strict=True))
    ratio = rows["importance_weight"]
    assert ratio[0] / ratio[1] == pytest.approx(
        expected.metrics["ppo_actor/update/importance_weight/avg"], rel=1e-5
    )
    # The splits put together are the whole.
    for name in ("importance_weight", "behave_imp_weight", "clipped"):
        parts = np.array([rows[f"{name}/staleness_{label}"] for label in STALENESS])
        merged = [*parts[:, :2].sum(0), parts[:, 2].min(), parts[:, 3].max()]
        assert merged == pytest.approx(rows[name], rel=1e-6)


def test_a_sequence_ratio_through_the_same_call():
    objective = SEQUENCE_OBJECTIVES["sequence"]
    problem = random_problem(vocab_size=56, objective=objective)
    rows = TrainedRows(problem.trained, (len(problem.trained),))
    found = a3po_loss(problem.hidden, problem.weight, rows, problem.fields, objective=objective, sweeps=2)  # type: ignore[arg-type]
    torch.testing.assert_close(found.loss, reference_answer(problem).loss.float())


def test_statistics_by_staleness_against_numpy():
    staleness = np.array([0, 1, 2, 3, 4, 5, 8, 9, 40, 0, 3, 2])
    vectors = np.random.default_rng(0).uniform(0.5, 2, (2, len(staleness)))
    clipped = np.arange(len(staleness)) % 3 == 0
    ratio, weight = (torch.from_numpy(vector).float() for vector in vectors)
    token_loss = TokenLoss(ratio, ratio, weight, torch.from_numpy(clipped))
    found = staleness_statistics(token_loss, torch.from_numpy(staleness).int())
    rows = dict(zip(found.names, found.table.tolist(), strict=True))
    columns = {
        "importance_weight": vectors[0],
        "behave_imp_weight": vectors[1],
        "clipped": clipped.astype(float),
    }
    assert len(rows) == len(columns) * len(BOUNDS)
    for name, vector in columns.items():
        for label, (low, high) in BOUNDS.items():
            chosen = vector[(staleness >= low) & (staleness <= high)]
            expected = [chosen.sum(), len(chosen), chosen.min(), chosen.max()]
            assert rows[f"{name}/staleness_{label}"] == pytest.approx(expected, rel=1e-6)


def test_a_staleness_nobody_has_is_the_neutral_row():
    token_loss = TokenLoss(*torch.ones(3, 2), torch.tensor([True, False]))  # type: ignore[arg-type]
    found = staleness_statistics(token_loss, torch.tensor([1, 1]))
    row = found.table[found.names.index("clipped/staleness_5-8")]
    assert row.tolist() == Statistics.empty(("",)).table[0].tolist()
