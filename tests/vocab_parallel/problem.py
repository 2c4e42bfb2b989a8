"""A random loss-layer problem, the layer's answer to it, and the float64 reference's."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.algorithm.metric_table import report
from megatron_a3po.algorithm.statistics import policy_statistics
from megatron_a3po.vocab_parallel import TokenFields, TrainedRows, vocab_parallel_loss
from megatron_a3po.vocab_parallel.policy_objective import PolicyObjective, interpolated
from megatron_a3po.vocab_parallel.reference import reference_loss

OBJECTIVE = PolicyObjective(interpolated("loglinear"), eps_low=0.2, eps_high=0.2, dual_clip=3.0)
# Errors allowed, over the largest reference value, in float32 with |logits| < 10.
TOLERANCES = {"loss": 1e-6, "logp": 1e-6, "entropy": 5e-6, "hidden_grad": 5e-6, "weight_grad": 5e-6}


def within(tolerance: float, *names: str) -> dict[str, float]:
    """The same tolerance for all these parts of an answer."""
    return dict.fromkeys(names or TOLERANCES, tolerance)


@dataclass(frozen=True)
class Problem:
    """Hidden states of a whole sequence, the whole padded embedding, and which rows are trained."""

    hidden: Tensor
    weight: Tensor
    trained: Tensor
    fields: TokenFields
    vocab_size: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What is compared; of whole tensors, or of one rank's part of them."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    metrics: dict[str, float]
    loss_size: float  # sum |loss_t|: what the error of a sum of either sign is judged by


def random_problem(
    *,
    num_rows: int = 40,
    hidden: int = 16,
    vocab_size: int = 53,
    padded_vocab: int = 56,
    trained: Tensor | None = None,
    highest_label: int | None = None,
    temperature: float = 1.0,
    scale: float = 0.4,
    seed: int = 0,
) -> Problem:
    """Unequal staleness, active clipping on both sides, behaviour log-probs near the target's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    if trained is None:
        trained = (torch.rand(num_rows, generator=generator) < 0.6).nonzero()[:, 0]
    states, weight, count = normal(num_rows, hidden), scale * normal(padded_vocab, hidden), len(trained)
    labels = integers(0, highest_label or vocab_size, count)
    logp = torch.log_softmax(states[trained] @ weight[:vocab_size].T / temperature, -1)
    behave = (logp.gather(1, labels[:, None])[:, 0] + 1.2 * normal(count)).clamp(max=-1e-3)
    staleness = integers(0, 9, count).int()
    weights = 0.1 + torch.rand(count, generator=generator)
    fields = TokenFields(labels, behave, staleness, normal(count), weights)
    return Problem(states, weight, trained, fields, vocab_size, temperature)


def local_rows(trained: Tensor, num_rows: int, world_size: int, rank: int) -> TrainedRows:
    """The rows of one slice of the sequence, under sequence parallelism."""
    slice_length = num_rows // world_size
    owner = trained // slice_length
    counts = tuple(int((owner == r).sum()) for r in range(world_size))
    return TrainedRows(trained[owner == rank] - rank * slice_length, counts)


def layer_answer(
    problem: Problem,
    *,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    upstream: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Answer:
    """The layer's, on this rank's part of the problem."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    weight = problem.weight.chunk(size)[rank].to(dtype).clone().requires_grad_()
    hidden, rows = problem.hidden, TrainedRows(problem.trained, (len(problem.trained),))
    if sequence_parallel and size > 1:
        hidden = hidden.chunk(size)[rank]
        rows = local_rows(problem.trained, len(problem.hidden), size, rank)
    hidden = hidden.to(dtype).clone().requires_grad_()
    settings: dict[str, Any] = {"vocab_size": problem.vocab_size, "temperature": problem.temperature}
    settings |= {"tp_group": group, "sequence_parallel": sequence_parallel, "chunk_tokens": chunk_tokens}
    output = vocab_parallel_loss(hidden, weight, rows, problem.fields, OBJECTIVE, **settings)
    (upstream * output.loss).backward()
    assert output.first_nonfinite.item() == -1
    assert hidden.grad is not None
    assert weight.grad is not None
    metrics = metrics_of(output.logp, output.entropy, problem.fields)
    return Answer(output.loss.detach(), output.logp, output.entropy, hidden.grad, weight.grad, *metrics)


def reference_answer(problem: Problem) -> Answer:
    """The dense float64 reference's; padding rows of the embedding have no gradient."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (problem.hidden, problem.weight))
    doubled = {
        k: v.double() for k, v in vars(problem.fields).items() if v is not None and v.is_floating_point()
    }
    fields = replace(problem.fields, **doubled)
    loss, logp, entropy = reference_loss(
        hidden, weight[: problem.vocab_size], problem.trained, fields, OBJECTIVE, problem.temperature
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Answer(loss.detach(), logp, entropy, hidden.grad, weight.grad, *metrics_of(logp, entropy, fields))


def metrics_of(logp: Tensor, entropy: Tensor, fields: TokenFields) -> tuple[dict[str, float], float]:
    token_loss = OBJECTIVE.token_loss(logp, fields)
    size = (token_loss.loss * fields.loss_weights).abs().sum().item()
    return report(policy_statistics(token_loss, logp, fields.behave_logp, entropy)), size


def assert_agree(found: Answer, expected: Answer, tolerances: dict[str, float] = TOLERANCES) -> None:
    """Every part within its tolerance, over the largest reference value; metrics to 1e-5 of max(|value|, 1e-3)."""
    for name, tolerance in tolerances.items():
        value, reference = getattr(found, name), getattr(expected, name)
        assert value.shape == reference.shape, name
        if value.numel() == 0:
            continue
        size = expected.loss_size if name == "loss" else reference.abs().max().item()
        assert (value - reference).abs().max().item() <= tolerance * size, name
    if tolerances is TOLERANCES:
        assert found.metrics.keys() == expected.metrics.keys()
        for name, reference in expected.metrics.items():
            assert abs(found.metrics[name] - reference) <= 1e-5 * max(abs(reference), 1e-3), name
