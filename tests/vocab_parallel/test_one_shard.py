"""The loss layer on one rank against the float64 reference: objectives, options, shapes, gradients."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_a3po.vocab_parallel import TokenFields, vocab_parallel_logp, vocab_parallel_loss
from megatron_a3po.vocab_parallel.policy_objective import (
    ClippedObjective,
    PolicyObjective,
    own_anchor,
    recomputed_anchor,
    rollout_anchor,
    supervised_objective,
)
from tests.vocab_parallel.problem import (
    OBJECTIVE,
    OBJECTIVES,
    SEQUENCE_OBJECTIVES,
    TOLERANCES,
    assert_agree,
    layer_answer,
    random_problem,
    reference_answer,
    rows_of,
    within,
)

ALONE: dict[str, Any] = {"tp_group": None, "sequence_parallel": False, "temperature": 1.0}
CALL: dict[str, Any] = {"vocab_size": 53, "chunk_tokens": 7, **ALONE}
Sweeps = Literal[1, 2]
SWEEPS: tuple[Sweeps, ...] = (1, 2)
both_sweeps = pytest.mark.parametrize("sweeps", SWEEPS)


@both_sweeps
@pytest.mark.parametrize("chunk", ["1", "7", "T-1", "T+9"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
def test_agrees_with_the_reference(chunk: str, temperature: Any, sweeps: Sweeps):
    problem = random_problem(temperature=temperature)
    num_tokens = len(problem.trained)
    chunk_tokens = {"1": 1, "7": 7, "T-1": num_tokens - 1, "T+9": num_tokens + 9}[chunk]
    expected = reference_answer(problem)
    assert 0.05 < expected.metrics["ppo_actor/update/clip_ratio"] < 0.8  # the clip is at work on some tokens
    assert_agree(layer_answer(problem, chunk_tokens=chunk_tokens, sweeps=sweeps), expected)


@both_sweeps
@pytest.mark.parametrize("name", OBJECTIVES | SEQUENCE_OBJECTIVES)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
@pytest.mark.parametrize("temperature", [1.0, "per token"])
def test_every_objective_and_option(name: str, entropy_coef: float, temperature: Any, sweeps: Sweeps):
    if name in SEQUENCE_OBJECTIVES and sweeps == 1:
        return  # refused: test_limits
    problem = random_problem(
        objective=(OBJECTIVES | SEQUENCE_OBJECTIVES)[name], entropy_coef=entropy_coef, temperature=temperature
    )
    assert_agree(layer_answer(problem, chunk_tokens=7, sweeps=sweeps), reference_answer(problem))
    if isinstance(problem.objective, ClippedObjective):
        answer = layer_answer(problem, chunk_tokens=7, sweeps=sweeps, public=True)
        assert_agree(answer, reference_answer(problem, public=True))


@settings(max_examples=60, derandomize=True)
@given(
    num_rows=st.integers(1, 30),
    hidden=st.integers(1, 20),
    vocab_size=st.integers(2, 70),
    padding=st.integers(0, 5),
    chunk_tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    sweeps=st.sampled_from(SWEEPS),
)
def test_agrees_whatever_the_shapes(
    num_rows: int,
    hidden: int,
    vocab_size: int,
    padding: int,
    chunk_tokens: int,
    seed: int,
    entropy_coef: float,
    sweeps: Sweeps,
):
    problem = random_problem(
        num_rows=num_rows,
        hidden=hidden,
        vocab_size=vocab_size,
        padded_vocab=vocab_size + padding,
        scale=0.5,
        seed=seed,
        entropy_coef=entropy_coef,
    )
    answer = layer_answer(problem, chunk_tokens=chunk_tokens, sweeps=sweeps)
    assert_agree(answer, reference_answer(problem), dict(TOLERANCES))
    assert answer.weight_grad[vocab_size:].abs().sum() == 0


@both_sweeps
def test_a_vocabulary_of_one_token_has_nothing_to_learn(sweeps: Sweeps):
    answer = layer_answer(
        random_problem(vocab_size=1, padded_vocab=4, entropy_coef=0.1), chunk_tokens=7, sweeps=sweeps
    )
    assert answer.logp.abs().sum() == answer.entropy.abs().sum() == 0
    assert answer.hidden_grad.abs().sum() == answer.weight_grad.abs().sum() == 0


@both_sweeps
def test_no_trained_token_is_a_loss_of_zero_with_gradients_of_zero(sweeps: Sweeps):
    problem = random_problem(trained=torch.empty(0, dtype=torch.int64))
    answer = layer_answer(problem, chunk_tokens=8, sweeps=sweeps)
    assert answer.loss.item() == 0
    assert len(answer.logp) == len(answer.entropy) == 0
    assert answer.hidden_grad.abs().sum() == 0
    assert answer.weight_grad.abs().sum() == 0
    assert answer.metrics == {}


@both_sweeps
def test_untrained_rows_may_hold_anything(sweeps: Sweeps):
    problem = random_problem()
    untrained = torch.ones(len(problem.hidden), dtype=torch.bool).index_fill(0, problem.trained, False)
    poisoned = replace(problem, hidden=problem.hidden.masked_fill(untrained[:, None], torch.nan))
    answer, clean = (layer_answer(p, chunk_tokens=7, sweeps=sweeps) for p in (poisoned, problem))
    assert torch.equal(answer.loss, clean.loss)
    assert torch.equal(answer.hidden_grad, clean.hidden_grad)
    assert torch.equal(answer.weight_grad, clean.weight_grad)


@both_sweeps
def test_backward_scales_both_gradients_by_the_upstream_gradient(sweeps: Sweeps):
    problem = random_problem(entropy_coef=0.05)
    once, thrice = (layer_answer(problem, chunk_tokens=7, upstream=u, sweeps=sweeps) for u in (1.0, 3.0))
    torch.testing.assert_close(thrice.hidden_grad, 3 * once.hidden_grad)
    torch.testing.assert_close(thrice.weight_grad, 3 * once.weight_grad)


@both_sweeps
def test_without_gradient_only_values_are_computed(sweeps: Sweeps):
    problem = random_problem()
    weight: Any = problem.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(problem.weight)
    with torch.no_grad():
        output = vocab_parallel_loss(
            problem.hidden, weight, rows_of(problem), problem.fields, OBJECTIVE, **CALL, sweeps=sweeps
        )
    assert not output.loss.requires_grad
    assert weight.main_grad.abs().sum() == 0
    trained = layer_answer(problem, chunk_tokens=7, sweeps=sweeps)
    assert torch.equal(output.loss, trained.loss)
    labels = problem.fields.labels
    logp, entropy = vocab_parallel_logp(problem.hidden, weight, rows_of(problem), labels, **CALL)
    assert torch.equal(logp, trained.logp)  # to the bit: what is recomputed is what is trained on
    assert torch.equal(entropy, trained.entropy)
    assert not logp.requires_grad


@both_sweeps
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_gradient(frozen: str, sweeps: Sweeps):
    problem = random_problem()
    inputs = {
        name: getattr(problem, name).clone().requires_grad_(name != frozen) for name in ("hidden", "weight")
    }
    output = vocab_parallel_loss(
        **inputs, rows=rows_of(problem), fields=problem.fields, objective=OBJECTIVE, **CALL, sweeps=sweeps
    )
    output.loss.backward()
    free = {"hidden": "weight", "weight": "hidden"}[frozen]
    torch.testing.assert_close(
        inputs[free].grad, getattr(layer_answer(problem, chunk_tokens=7), f"{free}_grad")
    )
    assert inputs[frozen].grad is None


class FrozenObjective:
    """An objective whose anchor and weight stay what they were at a base point, as finite differences need it."""

    def __init__(self, objective: PolicyObjective, base_logp: Tensor, fields: TokenFields):
        anchor = objective.anchor(base_logp, fields)
        self.fields = replace(fields, prox_logp=anchor)
        self.factor = torch.exp(anchor - fields.behave_logp).clamp(max=objective.behave_weight_cap)
        self.inner = replace(objective, anchor=recomputed_anchor, behave_weight="off")

    def __call__(self, logp: Tensor, fields: TokenFields) -> Tensor:
        weighted = replace(fields, loss_weights=self.factor * fields.loss_weights)
        return self.inner(logp, weighted)


@pytest.mark.parametrize("name", ["loglinear", "linear", "coupled"])
def test_gradients_are_finite_differences_with_anchor_and_weight_frozen(name: str):
    objective = OBJECTIVES[name]
    assert isinstance(objective, PolicyObjective)
    problem = random_problem(
        num_rows=12, hidden=5, vocab_size=11, padded_vocab=11, seed=3, objective=objective
    )
    found = layer_answer(problem, chunk_tokens=4)
    frozen = FrozenObjective(objective, found.logp, problem.fields)
    still = replace(problem, fields=frozen.fields, objective=frozen)
    assert_agree(layer_answer(still, chunk_tokens=11), found, within(2e-6, "hidden_grad", "weight_grad"))

    def loss(hidden: Tensor) -> float:
        return reference_answer(replace(still, hidden=hidden)).loss.item()

    step, base = 1e-6, problem.hidden.double()
    difference = torch.zeros_like(base)
    for index in torch.cartesian_prod(*map(torch.arange, base.shape)).tolist():
        ahead, behind = base.clone(), base.clone()
        ahead[tuple(index)] += step
        behind[tuple(index)] -= step
        difference[tuple(index)] = (loss(ahead) - loss(behind)) / (2 * step)
    assert (found.hidden_grad - difference).abs().max() <= 1e-5 * difference.abs().max()


@pytest.mark.parametrize("sweeps", [1])
def test_the_gradient_is_not_that_of_an_attached_anchor(sweeps: Sweeps):
    problem = random_problem()

    def attached(logp: Tensor, fields: TokenFields) -> Tensor:
        alpha = 1 / fields.staleness.clamp(min=1).to(logp.dtype)
        prox = alpha * fields.behave_logp + (1 - alpha) * logp
        ratio, weight = torch.exp(logp - prox), torch.exp(prox - fields.behave_logp)
        return -weight * ratio.clamp(0.8, 1.2) * fields.advantages * fields.loss_weights

    right = layer_answer(problem, chunk_tokens=7, sweeps=sweeps).hidden_grad
    wrong = layer_answer(replace(problem, objective=attached), chunk_tokens=7, sweeps=sweeps).hidden_grad
    assert (right - wrong).abs().max() > 0.05 * right.abs().max()


def ratios(anchor: Any, prox_logp: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(importance weights, their log-probs) as an objective inside the layer meets them."""
    problem, seen = random_problem(), []
    objective = PolicyObjective(anchor, eps_low=0.2, eps_high=0.2)

    def watching(logp: Tensor, fields: TokenFields) -> Tensor:
        seen.append(objective.token_loss(logp, fields).importance_weight)
        return objective(logp, fields)

    fields = replace(problem.fields, prox_logp=prox_logp)
    output = vocab_parallel_loss(problem.hidden, problem.weight, rows_of(problem), fields, watching, **CALL)
    return torch.cat(seen), output.logp


def test_ratios_of_a_first_mini_batch_are_exactly_one_recomputed_or_not():
    own, logp = ratios(own_anchor)
    assert (own == 1).all()
    recomputed, _ = ratios(recomputed_anchor, logp)
    assert (recomputed == 1).all()
    rollout, _ = ratios(rollout_anchor)
    assert torch.equal(rollout, torch.exp(logp - random_problem().fields.behave_logp))


def test_the_supervised_objective_is_cross_entropy():
    problem = random_problem()
    hidden = problem.hidden.clone().requires_grad_()
    fields = replace(problem.fields, loss_weights=torch.ones(len(problem.trained)))
    output = vocab_parallel_loss(
        hidden, problem.weight, rows_of(problem), fields, supervised_objective, **CALL
    )
    output.loss.backward()
    dense = problem.hidden.clone().requires_grad_()
    logits = dense[problem.trained] @ problem.weight[:53].T
    expected = torch.nn.functional.cross_entropy(logits, fields.labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(hidden.grad, dense.grad)
