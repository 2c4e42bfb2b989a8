"""What the layer refuses, in words, and what it says of numbers that are not finite."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_a3po.vocab_parallel import TrainedRows, a3po_loss, vocab_parallel_logp, vocab_parallel_loss
from megatron_a3po.vocab_parallel.limits import SpentOnce, refuse_loss_scaling
from megatron_a3po.vocab_parallel.policy_objective import (
    interpolated,
    recomputed_anchor,
    supervised_objective,
)
from tests.vocab_parallel.problem import (
    OBJECTIVE,
    SEQUENCE_OBJECTIVES,
    layer_answer,
    random_problem,
    rows_of,
)
from tests.vocab_parallel.test_one_shard import CALL, Sweeps, both_sweeps

SEQUENCE = SEQUENCE_OBJECTIVES["sequence"]
MISSPELT: Any = "logliner"


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


TRAINED = len(random_problem().trained)
VECTORS = (
    "behave_logp",
    "staleness",
    "advantages",
    "loss_weights",
    "prox_logp",
    "reference_logp",
    "sequence_ids",
)
# What is wrong with a call that scores or trains, and the sentence that says so.
WRONG_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"rows": TrainedRows(torch.arange(3), (3, 0))}, "rows.counts has 2 entries"),
    ({"rows": TrainedRows(torch.arange(3), (4,))}, "rows.local has 3 rows, but rows.counts says 4"),
    (
        {"rows": TrainedRows(torch.arange(3), (3,))},
        f"labels has {TRAINED} entries, but there are 3 trained rows",
    ),
    ({"rows": TrainedRows(torch.arange(41), (41,))}, "41 rows are trained, but hidden has 40"),
    (
        {"rows": TrainedRows.of_mask(torch.arange(45) < TRAINED)},
        "the mask of the rows is 45 long, but hidden has 40",
    ),
    ({"vocab_size": 57}, "vocab_size is 57, but 1 shards of 56 rows hold 56"),
    ({"vocab_size": 0}, "vocab_size is 0, but must be a whole number of 1 or more"),
    ({"vocab_size": -5}, "vocab_size is -5"),
    ({"chunk_tokens": -3}, "chunk_tokens is -3, but must be a whole number of 1 or more"),
    ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ({"chunk_tokens": 1.5}, "chunk_tokens is 1.5"),
    ({"temperature": 0.0}, "temperature is 0.0, but must be a positive number"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": torch.tensor(0.7)}, "temperature has shape (), but must be a vector over the trained"),
    (
        {"temperature": torch.tensor([0.7])},
        f"temperature has 1 entries, but there are {TRAINED} trained rows",
    ),
    ({"temperature": torch.ones(TRAINED).int()}, "temperature is torch.int32, but must hold floating-point"),
    ({"hidden": torch.zeros(40, 1, 16)}, "hidden has shape (40, 1, 16), but must have two dimensions"),
    ({"hidden": torch.zeros(40, 15)}, "hidden is 15 wide, but weight 16"),
    ({"hidden": torch.zeros(40, 16).bfloat16()}, "hidden is torch.bfloat16 and weight torch.float32"),
    ({"hidden": torch.zeros(40, 16).double()}, "hidden is torch.float64, but must be torch.float32 or"),
    ({"weight": torch.zeros(56, 16).half()}, "weight is torch.float16, but must be torch.float32 or"),
    ({"labels": torch.ones(TRAINED)}, "labels is torch.float32, but must hold whole numbers"),
    ({"labels": torch.ones(TRAINED, 1).long()}, f"labels has shape ({TRAINED}, 1), but must be a vector"),
]
# The same of calls that train.
WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: getattr(random_problem().fields, name)[:1]}, f"{name} has 1 entries, but there are {TRAINED}")
        for name in VECTORS
    ),
    ({"staleness": torch.ones(TRAINED)}, "staleness is torch.float32, but must hold whole numbers"),
    ({"loss_weights": torch.ones(TRAINED) > 0}, "loss_weights is torch.bool, but must hold floating-point"),
    ({"sweeps": 3}, "sweeps is 3, but must be 1 or 2"),
    (
        {"objective": replace(OBJECTIVE, anchor=recomputed_anchor), "prox_logp": None},
        "needs TokenFields.prox_logp",
    ),
    (
        {"objective": replace(OBJECTIVE, kl_coef=0.1), "reference_logp": None},
        "needs TokenFields.reference_logp",
    ),
    ({"objective": SEQUENCE, "sweeps": 2, "sequence_ids": None}, "found no ids and 4"),
    ({"objective": SEQUENCE, "sweeps": 2, "num_sequences": 0}, f"found {TRAINED} ids and 0"),
]


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside the tests: annotated shapes are not looked at."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def calls_of(change: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """(training, the one call for any trainer, scoring) of a problem changed like that."""
    problem = random_problem()
    names = vars(problem.fields)
    fields = replace(problem.fields, **{name: value for name, value in change.items() if name in names})
    rest = {name: value for name, value in change.items() if name not in names}
    inputs = {"hidden": problem.hidden, "weight": problem.weight, "rows": rows_of(problem), **rest}
    loss = {"fields": fields, "objective": OBJECTIVE, **CALL, **inputs}
    public = {name: value for name, value in loss.items() if name != "tp_group"}
    scored = {"labels": fields.labels, **CALL, **inputs}
    return (
        lambda: vocab_parallel_loss(**loss),
        lambda: a3po_loss(**public),
        lambda: vocab_parallel_logp(**scored),
    )


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "says"), WRONG_CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], says: str):
    for call in calls_of(change):
        with pytest.raises(ValueError, match=re.escape(says)):
            call()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "says"), WRONG_FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_fields_that_do_not_fit_are_refused(change: dict[str, Any], says: str):
    for call in calls_of(change)[:2]:
        with pytest.raises(ValueError, match=re.escape(says)):
            call()


def test_what_fits_is_not_refused():
    for call in calls_of({"temperature": torch.ones(TRAINED)}):
        call()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: TrainedRows.of_mask(torch.ones(1, 5).bool()),
            "mask is torch.bool of shape (1, 5), but must be",
        ),
        (
            lambda: TrainedRows.of_mask(torch.ones(5)),
            "mask is torch.float32 of shape (5,), but must be torch.bool",
        ),
        (
            lambda: TrainedRows.of_masks(torch.ones(5).bool(), 0),
            "masks is torch.bool of shape (5,), but must be",
        ),
        (
            lambda: interpolated(MISSPELT),
            "method is 'logliner'; it must be one of loglinear, linear, rollout",
        ),
        (
            lambda: replace(OBJECTIVE, behave_weight="clmap"),
            "behave_weight is 'clmap'; it must be one of clamp, mask",
        ),
        (lambda: replace(OBJECTIVE, eps_low=-0.2), "eps_low is -0.2, but must not be negative"),
        (
            lambda: calls_of({"objective": supervised_objective})[1](),
            "must be a PolicyObjective or a Sequence",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_meant_is_refused_where_it_is_made(make: Callable[[], Any], says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()
