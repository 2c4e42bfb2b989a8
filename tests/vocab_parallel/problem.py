"""A random loss-layer problem, the layer's answer to it, and the float64 reference's."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.algorithm.metric_table import report
from megatron_a3po.algorithm.statistics import Statistics, policy_statistics
from megatron_a3po.vocab_parallel import (
    A3POLoss,
    Objective,
    TokenFields,
    TrainedRows,
    Workspace,
    a3po_loss,
    vocab_parallel_loss,
)
from megatron_a3po.vocab_parallel.a3po_loss import staleness_statistics
from megatron_a3po.vocab_parallel.policy_objective import (
    ClippedObjective,
    PolicyObjective,
    SequenceObjective,
    interpolated,
    own_anchor,
    recomputed_anchor,
    rollout_anchor,
    supervised_objective,
)
from megatron_a3po.vocab_parallel.reference import reference_loss

CLIP: dict[str, Any] = {"eps_low": 0.2, "eps_high": 0.2}
OBJECTIVE = PolicyObjective(interpolated("loglinear"), **CLIP, dual_clip=3.0)
OBJECTIVES: dict[str, Objective] = {
    "loglinear": OBJECTIVE,
    "linear": PolicyObjective(interpolated("linear"), **CLIP),
    "recompute, first mini-batch": PolicyObjective(own_anchor, **CLIP),
    "recompute, later mini-batches": PolicyObjective(recomputed_anchor, **CLIP),
    "coupled": PolicyObjective(rollout_anchor, **CLIP, behave_weight="off"),
    "weight masked": PolicyObjective(
        interpolated("loglinear"), **CLIP, behave_weight="mask", behave_weight_cap=1.3
    ),
    "near a reference": PolicyObjective(interpolated("loglinear"), **CLIP, kl_coef=0.1),
    "supervised": supervised_objective,
}
SEQUENCE_OBJECTIVES: dict[str, Objective] = {
    "sequence": SequenceObjective(interpolated("loglinear"), **CLIP),
    "sequence, dual clip, near a reference": SequenceObjective(
        rollout_anchor, **CLIP, dual_clip=3.0, kl_coef=0.1
    ),
}
# Errors allowed, over the largest reference value, in float32 with |logits| < 10.
TOLERANCES = {"loss": 1e-6, "logp": 1e-6, "entropy": 5e-6, "hidden_grad": 5e-6, "weight_grad": 5e-6}


def within(tolerance: float, *names: str) -> dict[str, float]:
    """The same tolerance for all these parts of an answer."""
    return dict.fromkeys(names or TOLERANCES, tolerance)


@dataclass(frozen=True)
class Problem:
    """Hidden states of a whole sequence, the whole padded embedding, which rows are trained, and on what."""

    hidden: Tensor
    weight: Tensor
    trained: Tensor
    fields: TokenFields
    vocab_size: int
    temperature: float | Tensor = 1.0
    objective: Objective = field(default=OBJECTIVE)
    entropy_coef: float = 0.0


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
    temperature: float | Literal["per token"] = 1.0,
    scale: float = 0.4,
    seed: int = 0,
    objective: Objective = OBJECTIVE,
    entropy_coef: float = 0.0,
) -> Problem:
    """Unequal staleness, active clipping on both sides, behaviour log-probs near the target's, four sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    if trained is None:
        trained = (torch.rand(num_rows, generator=generator) < 0.6).nonzero()[:, 0]
    states, weight, count = normal(num_rows, hidden), scale * normal(padded_vocab, hidden), len(trained)
    divisor = 0.5 + torch.rand(count, generator=generator) if temperature == "per token" else temperature
    column = divisor[:, None] if isinstance(divisor, Tensor) else divisor
    labels = integers(0, highest_label or vocab_size, count)
    logp = torch.log_softmax(states[trained] @ weight[:vocab_size].T / column, -1)
    target = logp.gather(1, labels[:, None])[:, 0]
    fields = TokenFields(
        labels=labels,
        behave_logp=(target + 1.2 * normal(count)).clamp(max=-1e-3),
        staleness=integers(0, 9, count).int(),
        advantages=normal(count),
        loss_weights=0.1 + torch.rand(count, generator=generator),
        prox_logp=target + 0.3 * normal(count),
        reference_logp=target + 0.5 * normal(count),
        sequence_ids=torch.arange(count) * 4 // max(count, 1),
        num_sequences=4,
    )
    return Problem(states, weight, trained, fields, vocab_size, divisor, objective, entropy_coef)


def rows_of(problem: Problem) -> TrainedRows:
    """The trained rows of one rank, or of ranks that all hold everything."""
    return TrainedRows(problem.trained, (len(problem.trained),))


def local_rows(trained: Tensor, num_rows: int, world_size: int, rank: int) -> TrainedRows:
    """The rows of one slice of the sequence, under sequence parallelism."""
    slice_length = num_rows // world_size
    owner = trained // slice_length
    counts = tuple(int((owner == r).sum()) for r in range(world_size))
    return TrainedRows(trained[owner == rank] - rank * slice_length, counts)


def part_of(
    problem: Problem, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> tuple[Tensor, Tensor, TrainedRows]:
    """This rank's (hidden states, weight shard, trained rows)."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    weight = problem.weight.chunk(size)[rank]
    if sequence_parallel and size > 1:
        rows = local_rows(problem.trained, len(problem.hidden), size, rank)
        return problem.hidden.chunk(size)[rank], weight, rows
    return problem.hidden, weight, rows_of(problem)


def layer_answer(
    problem: Problem,
    *,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    upstream: float = 1.0,
    dtype: torch.dtype = torch.float32,
    sweeps: Literal[1, 2] = 1,
    workspace: Workspace | None = None,
    public: bool = False,
) -> Answer:
    """The layer's, on this rank's part of the problem; public: as a trainer of another make would call it."""
    hidden, weight, rows = part_of(problem, group, sequence_parallel)
    hidden, weight = (tensor.to(dtype).clone().requires_grad_() for tensor in (hidden, weight))
    settings: dict[str, Any] = {
        "objective": problem.objective,
        "vocab_size": problem.vocab_size,
        "temperature": problem.temperature,
        "sequence_parallel": sequence_parallel,
        "chunk_tokens": chunk_tokens,
        "entropy_coef": problem.entropy_coef,
        "sweeps": sweeps,
        "workspace": workspace,
    }
    if public:
        output = a3po_loss(hidden, weight, rows, problem.fields, group=group, **settings)
    else:
        output = vocab_parallel_loss(hidden, weight, rows, problem.fields, tp_group=group, **settings)
    (upstream * output.loss).backward()
    assert output.first_nonfinite.item() == -1
    assert hidden.grad is not None
    assert weight.grad is not None
    metrics, size = metrics_of(problem.objective, output.logp, output.entropy, problem.fields)
    if isinstance(output, A3POLoss):
        metrics = by_name(output.statistics)
    return Answer(output.loss.detach(), output.logp, output.entropy, hidden.grad, weight.grad, metrics, size)


def reference_answer(problem: Problem, *, public: bool = False) -> Answer:
    """The dense float64 reference's; padding rows of the embedding have no gradient."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (problem.hidden, problem.weight))
    floats = {
        k: v for k, v in vars(problem.fields).items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    fields = replace(problem.fields, **{name: vector.double() for name, vector in floats.items()})
    loss, logp, entropy = reference_loss(
        hidden,
        weight[: problem.vocab_size],
        problem.trained,
        fields,
        problem.objective,
        problem.temperature.double() if isinstance(problem.temperature, Tensor) else problem.temperature,
        problem.entropy_coef,
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    metrics, size = metrics_of(problem.objective, logp, entropy, fields)
    if public and isinstance(problem.objective, ClippedObjective):
        token_loss = problem.objective.token_loss(logp, fields)
        whole = policy_statistics(token_loss, logp, fields.behave_logp, entropy)
        metrics = by_name(whole.merge(staleness_statistics(token_loss, fields.staleness)))
    return Answer(loss.detach(), logp, entropy, hidden.grad, weight.grad, metrics, size)


def by_name(statistics: Statistics) -> dict[str, float]:
    """Sum, count, min and max of each quantity; of those that nothing was counted for, the count."""
    rows = zip(statistics.names, statistics.table.tolist(), strict=True)
    return {
        f"{name} {what}": number
        for name, row in rows
        for what, number in zip(("sum", "count", "min", "max"), row, strict=True)
        if row[1] > 0 or what == "count"
    }


def metrics_of(
    objective: Objective, logp: Tensor, entropy: Tensor, fields: TokenFields
) -> tuple[dict[str, float], float]:
    """(metrics of a policy objective, size of the loss)."""
    size = objective(logp, fields).abs().sum().item()
    if not isinstance(objective, ClippedObjective):
        return {}, size
    found = policy_statistics(objective.token_loss(logp, fields), logp, fields.behave_logp, entropy)
    return report(found), size


def assert_agree(found: Answer, expected: Answer, tolerances: dict[str, float] = TOLERANCES) -> None:
    """Every part within its tolerance, over the largest reference value; metrics to 1e-5 of max(|value|, 1e-2)."""
    for name, tolerance in tolerances.items():
        value, reference = getattr(found, name), getattr(expected, name)
        assert value.shape == reference.shape, name
        if value.numel() == 0:
            continue
        size = expected.loss_size if name == "loss" else reference.abs().max().item()
        error = (value - reference).abs().max().item()
        assert error <= tolerance * size, f"{name}: {error / size:.1e}"
    if tolerances is TOLERANCES:
        assert found.metrics.keys() == expected.metrics.keys()
        for name, reference in expected.metrics.items():
            assert abs(found.metrics[name] - reference) <= 1e-5 * max(abs(reference), 1e-2), name
