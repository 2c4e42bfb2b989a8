"""What is reached beyond comfortable numbers: extreme logits, sure models, half precision, the main gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_a3po.vocab_parallel import vocab_parallel_loss
from tests.vocab_parallel.problem import (
    OBJECTIVE,
    Problem,
    assert_agree,
    layer_answer,
    random_problem,
    reference_answer,
    rows_of,
    within,
)
from tests.vocab_parallel.test_one_shard import CALL, Sweeps, both_sweeps


@both_sweeps
@pytest.mark.parametrize("scale", [1.0, 1e1, 1e3, 1e4])
def test_large_logits_stay_finite_and_near(scale: float, sweeps: Sweeps):
    problem = random_problem(scale=scale, entropy_coef=0.01)
    largest = (problem.hidden @ problem.weight.T).abs().max()
    answer, expected = layer_answer(problem, chunk_tokens=7, sweeps=sweeps), reference_answer(problem)
    # The product of 16 float32 terms of size |logit| and the reference's differ by this much themselves.
    assert (answer.logp - expected.logp).abs().max() <= 4e-7 * largest
    # From the very float32 logits it had, its own share is a quarter of that.
    logits = (problem.hidden[problem.trained] @ problem.weight[: problem.vocab_size].T).double()
    logp = torch.log_softmax(logits, -1).gather(1, problem.fields.labels[:, None])[:, 0]
    assert (answer.logp - logp).abs().max() <= 1e-7 * largest
    for name in ("loss", "entropy", "hidden_grad", "weight_grad"):
        assert getattr(answer, name).isfinite().all(), name
    assert (answer.entropy >= -1e-6).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_exact_logits_of_ten_thousand_are_within_two_units_in_the_last_place(size: float):
    """Every logit is a float32 number to begin with: what is lost is the layer's own doing."""
    problem = random_problem(hidden=56, vocab_size=56)
    spread = torch.randn(40, 56, generator=torch.Generator().manual_seed(1)) * 3
    exact = replace(problem, hidden=(size + spread).float(), weight=torch.eye(56))
    answer, expected = layer_answer(exact, chunk_tokens=7), reference_answer(exact)
    assert (answer.logp - expected.logp).abs().max() <= 2 * 2**-10
    assert_agree(answer, expected, within(5e-6, "entropy", "hidden_grad", "weight_grad"))


def test_logits_far_below_zero():
    problem = random_problem(scale=0.1)
    hidden = torch.cat([problem.hidden, torch.full((len(problem.hidden), 1), 100.0)], 1)
    weight = torch.cat([problem.weight, torch.full((len(problem.weight), 1), -100.0)], 1)
    shifted = replace(problem, hidden=hidden, weight=weight)  # every logit is 1e4 lower
    answer, expected = layer_answer(shifted, chunk_tokens=7), reference_answer(shifted)
    assert (answer.logp - expected.logp).abs().max() < 2 * 2**-10  # two units in the last place of 1e4
    assert answer.entropy.isfinite().all()


@both_sweeps
def test_where_the_model_is_sure_the_gradient_is_still_exact(sweeps: Sweeps):
    """1 - p is 1e-6 here: as a difference of float32 numbers it would have one digit."""
    problem = random_problem(hidden=56, vocab_size=56, scale=0.0)
    sure = replace(problem, weight=torch.eye(56), hidden=torch.randn(40, 56))
    sure.hidden[sure.trained, sure.fields.labels] += 17.0
    answer, expected = layer_answer(sure, chunk_tokens=7, sweeps=sweeps), reference_answer(sure)
    assert expected.logp.abs().max() < 1e-4
    assert_agree(answer, expected, within(5e-6, "hidden_grad", "weight_grad", "entropy"))


def in_bfloat16(problem: Problem) -> Problem:
    return replace(
        problem, hidden=problem.hidden.bfloat16().float(), weight=problem.weight.bfloat16().float()
    )


@both_sweeps
def test_bfloat16(sweeps: Sweeps):
    """Values to float32's error: a CPU multiplies in float32. Gradients to what bfloat16 resolves, 2^-8."""
    problem = in_bfloat16(random_problem(scale=0.5, entropy_coef=0.01))
    answer = layer_answer(problem, chunk_tokens=7, dtype=torch.bfloat16, sweeps=sweeps)
    assert answer.hidden_grad.dtype == answer.weight_grad.dtype == torch.bfloat16
    tolerances = within(5e-6, "loss", "logp", "entropy") | within(4e-3, "hidden_grad", "weight_grad")
    assert_agree(answer, reference_answer(problem), tolerances)


@both_sweeps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_weight_gradient_goes_into_the_main_gradient(
    dtype: torch.dtype, main_dtype: torch.dtype, tied: bool, sweeps: Sweeps
):
    problem = random_problem()
    rounded = problem if dtype == torch.float32 else in_bfloat16(problem)
    hidden = rounded.hidden.to(dtype, copy=True).requires_grad_()
    weight: Any = rounded.weight.to(dtype, copy=True).requires_grad_()
    already = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(main_dtype)
    # What Megatron-Core's DDP hangs on a weight.
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = already.clone(), False, tied
    output = vocab_parallel_loss(
        hidden, weight, rows_of(problem), problem.fields, OBJECTIVE, **CALL, sweeps=sweeps
    )
    output.loss.backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None  # the hooks of DDP assert that
    assert not tied or weight.grad.abs().sum() == 0
    expected = reference_answer(rounded).weight_grad
    added = weight.main_grad.float() - already.float()
    tolerance = 5e-6 if main_dtype == torch.float32 else 4e-2
    assert (added - expected).abs().max() <= tolerance * expected.abs().max()
