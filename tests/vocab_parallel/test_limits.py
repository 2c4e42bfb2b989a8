"""What the layer refuses, in words, and what it says of numbers that are not finite."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_a3po.vocab_parallel import TrainedRows, vocab_parallel_logp, vocab_parallel_loss
from megatron_a3po.vocab_parallel.limits import SpentOnce, refuse_loss_scaling, refuse_too_few_sweeps
from tests.vocab_parallel.problem import (
    OBJECTIVE,
    SEQUENCE_OBJECTIVES,
    layer_answer,
    random_problem,
    rows_of,
)
from tests.vocab_parallel.test_one_shard import CALL, Sweeps, both_sweeps


def loss_of(hidden: Tensor, sweeps: Any = 1, objective: Any = OBJECTIVE, **changes: Any) -> Any:
    problem = random_problem()
    fields = replace(problem.fields, **changes)
    return vocab_parallel_loss(
        hidden, problem.weight, rows_of(problem), fields, objective, **CALL, sweeps=sweeps
    )


def hidden_states() -> Tensor:
    return random_problem().hidden.clone().requires_grad_()


@both_sweeps
def test_a_second_backward_is_refused(sweeps: Sweeps):
    output = loss_of(hidden_states(), sweeps)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward per forward"):
        output.loss.backward()


@both_sweeps
def test_a_second_derivative_is_refused(sweeps: Sweeps):
    hidden = hidden_states()
    (gradient,) = torch.autograd.grad(loss_of(hidden, sweeps).loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@both_sweeps
def test_an_upstream_gradient_of_several_numbers_is_refused(sweeps: Sweeps):
    hidden = hidden_states()
    loss = loss_of(hidden, sweeps).loss
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, hidden, torch.ones(3), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="one number, and has shape \\(3,\\)"):
        SpentOnce().take(torch.ones(3))


@both_sweeps
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_recompute_around_the_layer_is_refused(reentrant: bool, sweeps: Sweeps):
    hidden = hidden_states()

    def head(states: Tensor) -> Tensor:
        return loss_of(states.tanh(), sweeps).loss

    with pytest.raises(RuntimeError, match="activation recompute"):
        torch.as_tensor(checkpoint(head, hidden, use_reentrant=reentrant)).backward()


def test_activation_recompute_before_the_layer_is_what_it_is_made_for():
    hidden = hidden_states()
    states = checkpoint(torch.tanh, hidden, use_reentrant=False)
    assert isinstance(states, Tensor)
    loss_of(states).loss.backward()
    plain = hidden_states()
    loss_of(plain.tanh()).loss.backward()
    assert torch.equal(torch.as_tensor(hidden.grad), torch.as_tensor(plain.grad))


def test_loss_scaling_is_refused_at_start_up():
    refuse_loss_scaling(None)
    with pytest.raises(ValueError, match="grad_scale_func"):
        refuse_loss_scaling(lambda loss: 1024 * loss)


@pytest.mark.parametrize("name", SEQUENCE_OBJECTIVES)
def test_a_sequence_ratio_in_one_sweep_is_refused(name: str):
    with pytest.raises(ValueError, match="sweeps=2"):
        layer_answer(random_problem(objective=SEQUENCE_OBJECTIVES[name]), chunk_tokens=7)


@both_sweeps
@pytest.mark.parametrize("field", ["behave_logp", "advantages"])
def test_the_first_non_finite_token_is_named(field: str, sweeps: Sweeps):
    bad = getattr(random_problem().fields, field).clone()
    bad[[11, 19]] = torch.nan
    assert loss_of(hidden_states(), sweeps, **{field: bad}).first_nonfinite.item() == 11


@both_sweeps
def test_a_non_finite_hidden_state_is_named(sweeps: Sweeps):
    problem = random_problem()
    hidden = problem.hidden.clone()
    hidden[problem.trained[5]] = torch.inf
    assert loss_of(hidden, sweeps).first_nonfinite.item() == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"sequence_parallel": False, "rows": TrainedRows(torch.arange(3), (3, 0))},
            "rows.counts has 2 entries",
        ),
        ({"rows": TrainedRows(torch.arange(3), (4,))}, "rows.local has 3 rows, but rows.counts says 4"),
        ({"rows": TrainedRows(torch.arange(3), (3,))}, "labels, but 3 trained rows"),
        ({"vocab_size": 57}, "vocab_size is 57, but 1 shards of 56 rows hold 56"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], says: str):
    problem = random_problem()
    call = {
        "rows": rows_of(problem),
        "fields": problem.fields,
        "objective": problem.objective,
        **CALL,
        **change,
    }
    with pytest.raises(ValueError, match=re.escape(says)):
        vocab_parallel_loss(problem.hidden, problem.weight, **call)
    settings = {key: call[key] for key in (*CALL, "rows")}
    with pytest.raises(ValueError, match=re.escape(says)):
        vocab_parallel_logp(problem.hidden, problem.weight, labels=problem.fields.labels, **settings)


def test_there_are_one_or_two_sweeps():
    with pytest.raises(ValueError, match="sweeps is 3, but must be 1 or 2"):
        refuse_too_few_sweeps(OBJECTIVE, 3)
