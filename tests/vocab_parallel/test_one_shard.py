"""The loss layer on one rank against the float64 reference, and its limits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_a3po.vocab_parallel import (
    TokenFields,
    TrainedRows,
    choose_chunk_tokens,
    vocab_parallel_logp,
    vocab_parallel_loss,
)
from megatron_a3po.vocab_parallel.policy_objective import (
    PolicyObjective,
    own_anchor,
    recomputed_anchor,
    rollout_anchor,
    supervised_objective,
)
from tests.vocab_parallel.problem import (
    OBJECTIVE,
    Problem,
    assert_agree,
    layer_answer,
    random_problem,
    reference_answer,
    within,
)

ALONE: dict[str, Any] = {"tp_group": None, "sequence_parallel": False, "temperature": 1.0}
NOTHING_TRAINED = torch.empty(0, dtype=torch.int64)


def with_main_grad(weight: Any, main_grad: torch.Tensor, *, tied: bool = False) -> Any:
    """The weight with what Megatron-Core's DDP hangs on it."""
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = main_grad, False, tied
    return weight


def rows_of(problem: Problem) -> TrainedRows:
    return TrainedRows(problem.trained, (len(problem.trained),))


@pytest.mark.parametrize("chunk", ["1", "7", "T-1", "T+9"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_agrees_with_the_reference(chunk: str, temperature: float):
    problem = random_problem(temperature=temperature)
    num_tokens = len(problem.trained)
    chunk_tokens = {"1": 1, "7": 7, "T-1": num_tokens - 1, "T+9": num_tokens + 9}[chunk]
    expected = reference_answer(problem)
    assert 0.05 < expected.metrics["ppo_actor/update/clip_ratio"] < 0.8  # the clip is at work on some tokens
    assert_agree(layer_answer(problem, chunk_tokens=chunk_tokens), expected)


@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 30),
    hidden=st.integers(1, 20),
    vocab_size=st.integers(2, 70),
    padding=st.integers(0, 5),
    chunk_tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_agrees_whatever_the_shapes(
    num_rows: int, hidden: int, vocab_size: int, padding: int, chunk_tokens: int, seed: int
):
    problem = random_problem(
        num_rows=num_rows,
        hidden=hidden,
        vocab_size=vocab_size,
        padded_vocab=vocab_size + padding,
        scale=0.5,
        seed=seed,
    )
    answer = layer_answer(problem, chunk_tokens=chunk_tokens)
    expected = reference_answer(problem)
    tolerances = within(1e-5)
    assert_agree(answer, expected, tolerances)
    assert answer.weight_grad[vocab_size:].abs().sum() == 0


def test_no_trained_token_is_a_loss_of_zero_with_gradients_of_zero():
    problem = random_problem(trained=NOTHING_TRAINED)
    answer = layer_answer(problem, chunk_tokens=8)
    assert answer.loss.item() == 0
    assert len(answer.logp) == len(answer.entropy) == 0
    assert answer.hidden_grad.abs().sum() == 0
    assert answer.weight_grad.abs().sum() == 0
    assert answer.metrics == {}


def test_untrained_rows_may_hold_anything():
    problem = random_problem()
    untrained = torch.ones(len(problem.hidden), dtype=torch.bool).index_fill(0, problem.trained, False)
    poisoned = replace(problem, hidden=problem.hidden.masked_fill(untrained[:, None], torch.nan))
    answer, clean = (layer_answer(p, chunk_tokens=7) for p in (poisoned, problem))
    assert torch.equal(answer.loss, clean.loss)
    assert torch.equal(answer.hidden_grad, clean.hidden_grad)
    assert torch.equal(answer.weight_grad, clean.weight_grad)


def test_backward_scales_both_gradients_by_the_upstream_gradient():
    problem = random_problem()
    once, thrice = (layer_answer(problem, chunk_tokens=7, upstream=factor) for factor in (1.0, 3.0))
    torch.testing.assert_close(thrice.hidden_grad, 3 * once.hidden_grad)
    torch.testing.assert_close(thrice.weight_grad, 3 * once.weight_grad)


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_large_logits_stay_finite_and_near(scale: float):
    problem = random_problem(scale=scale)
    logits = problem.hidden @ problem.weight.T
    answer, expected = layer_answer(problem, chunk_tokens=7), reference_answer(problem)
    error = (answer.logp - expected.logp).abs().max()
    assert error <= 4e-7 * logits.abs().max()
    assert answer.hidden_grad.isfinite().all()


def test_logits_far_below_zero():
    problem = random_problem(scale=0.1)
    hidden = torch.cat([problem.hidden, torch.full((len(problem.hidden), 1), 100.0)], 1)
    weight = torch.cat([problem.weight, torch.full((len(problem.weight), 1), -100.0)], 1)
    shifted = replace(problem, hidden=hidden, weight=weight)  # every logit is 1e4 lower
    answer, expected = layer_answer(shifted, chunk_tokens=7), reference_answer(shifted)
    assert (answer.logp - expected.logp).abs().max() < 2 * 2**-10  # two units in the last place of 1e4
    assert answer.entropy.isfinite().all()


def test_bfloat16():
    problem = random_problem(scale=0.5)
    rounded = replace(
        problem, hidden=problem.hidden.bfloat16().float(), weight=problem.weight.bfloat16().float()
    )
    answer = layer_answer(rounded, chunk_tokens=7, dtype=torch.bfloat16)
    assert answer.hidden_grad.dtype == answer.weight_grad.dtype == torch.bfloat16
    tolerances = within(2e-2, "logp", "entropy", "hidden_grad", "weight_grad")
    assert_agree(answer, reference_answer(rounded), tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_weight_gradient_goes_into_the_main_gradient(dtype: torch.dtype, tied: bool):
    problem = random_problem()
    rounded = replace(
        problem, hidden=problem.hidden.to(dtype).float(), weight=problem.weight.to(dtype).float()
    )
    hidden, weight = (
        tensor.to(dtype, copy=True).requires_grad_() for tensor in (rounded.hidden, rounded.weight)
    )
    already = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight = with_main_grad(weight, already.clone(), tied=tied)
    output = vocab_parallel_loss(
        hidden, weight, rows_of(problem), problem.fields, OBJECTIVE, vocab_size=53, chunk_tokens=7, **ALONE
    )
    output.loss.backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None  # the hooks of DDP assert that
    assert not tied or weight.grad.abs().sum() == 0
    expected = reference_answer(rounded).weight_grad
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    assert (weight.main_grad - already - expected).abs().max() <= tolerance * expected.abs().max()


def test_without_gradient_only_values_are_computed():
    problem = random_problem()
    weight = with_main_grad(problem.weight.clone().requires_grad_(), torch.zeros_like(problem.weight))
    call: dict[str, Any] = {"vocab_size": 53, "chunk_tokens": 7, **ALONE}
    with torch.no_grad():
        output = vocab_parallel_loss(
            problem.hidden, weight, rows_of(problem), problem.fields, OBJECTIVE, **call
        )
    assert not output.loss.requires_grad
    assert weight.main_grad.abs().sum() == 0
    trained = layer_answer(problem, chunk_tokens=7)
    assert torch.equal(output.loss, trained.loss)
    logp, entropy = vocab_parallel_logp(
        problem.hidden, weight, rows_of(problem), problem.fields.labels, **call
    )
    assert torch.equal(logp, trained.logp)  # to the bit: what is recomputed is what is trained on
    assert torch.equal(entropy, trained.entropy)
    assert not logp.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_gradient(frozen: str):
    problem = random_problem()
    inputs = {
        name: getattr(problem, name).clone().requires_grad_(name != frozen) for name in ("hidden", "weight")
    }
    output = vocab_parallel_loss(
        **inputs,
        rows=rows_of(problem),
        fields=problem.fields,
        objective=OBJECTIVE,
        vocab_size=53,
        chunk_tokens=7,
        **ALONE,
    )
    output.loss.backward()
    free = {"hidden": "weight", "weight": "hidden"}[frozen]
    torch.testing.assert_close(
        inputs[free].grad, getattr(layer_answer(problem, chunk_tokens=7), f"{free}_grad")
    )
    assert inputs[frozen].grad is None


def test_a_second_backward_is_refused():
    problem = random_problem()
    hidden = problem.hidden.clone().requires_grad_()
    output = vocab_parallel_loss(
        hidden,
        problem.weight,
        rows_of(problem),
        problem.fields,
        OBJECTIVE,
        vocab_size=53,
        chunk_tokens=7,
        **ALONE,
    )
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward per forward"):
        output.loss.backward()


@pytest.mark.parametrize("field", ["behave_logp", "advantages"])
def test_the_first_non_finite_token_is_named(field: str):
    problem = random_problem()
    bad = getattr(problem.fields, field).clone()
    bad[[11, 19]] = torch.nan
    fields = replace(problem.fields, **{field: bad})
    output = vocab_parallel_loss(
        problem.hidden,
        problem.weight,
        rows_of(problem),
        fields,
        OBJECTIVE,
        vocab_size=53,
        chunk_tokens=7,
        **ALONE,
    )
    assert output.first_nonfinite.item() == 11


def test_a_non_finite_hidden_state_is_named():
    problem = random_problem()
    hidden = problem.hidden.clone()
    hidden[problem.trained[5]] = torch.inf
    output = vocab_parallel_loss(
        hidden,
        problem.weight,
        rows_of(problem),
        problem.fields,
        OBJECTIVE,
        vocab_size=53,
        chunk_tokens=7,
        **ALONE,
    )
    assert output.first_nonfinite.item() == 5


def ratios(anchor: Any, prox_logp: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(importance weights, their log-probs) as an objective inside the layer meets them."""
    problem, seen = random_problem(), []
    objective = PolicyObjective(anchor, eps_low=0.2, eps_high=0.2)

    def watching(logp: torch.Tensor, fields: TokenFields) -> torch.Tensor:
        seen.append(objective.token_loss(logp, fields).importance_weight)
        return objective(logp, fields)

    fields = replace(problem.fields, prox_logp=prox_logp)
    call: dict[str, Any] = {"vocab_size": 53, "chunk_tokens": 7, **ALONE}
    output = vocab_parallel_loss(problem.hidden, problem.weight, rows_of(problem), fields, watching, **call)
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
    call: dict[str, Any] = {"vocab_size": 53, "chunk_tokens": 7, **ALONE}
    fields = replace(problem.fields, loss_weights=torch.ones(len(problem.trained)))
    output = vocab_parallel_loss(
        hidden, problem.weight, rows_of(problem), fields, supervised_objective, **call
    )
    output.loss.backward()
    dense = problem.hidden.clone().requires_grad_()
    logits = dense[problem.trained] @ problem.weight[:53].T
    expected = torch.nn.functional.cross_entropy(logits, fields.labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(hidden.grad, dense.grad)


def test_chunks_are_long_where_the_workspace_allows_and_never_too_short():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_chunk_tokens(128, 64, cpu) == 2048
    assert choose_chunk_tokens(1024, 32768, cpu) == 1920
    assert choose_chunk_tokens(4096, 151936, cpu) == 384
    assert choose_chunk_tokens(8192, 10**6, cpu) == 256
    assert choose_chunk_tokens(4096, 151936, cuda) == 6656
    assert choose_chunk_tokens(4096, 151936 // 8, cuda) == 16384
