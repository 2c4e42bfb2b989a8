"""The loss layer over two vocabulary shards on real gloo ranks, against the float64 reference.

The ranks are started once; they run every case and hand their answers back, the parent compares.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_a3po.algorithm.metric_table import QUANTITIES, report
from megatron_a3po.algorithm.statistics import Statistics
from megatron_a3po.vocab_parallel import TrainedRows, vocab_parallel_logp
from megatron_a3po.vocab_parallel.collectives import merge_over_ranks
from tests.distributed.ranks import run_ranks
from tests.vocab_parallel.problem import (
    Answer,
    Problem,
    assert_agree,
    layer_answer,
    local_rows,
    random_problem,
    reference_answer,
    within,
)

NUM_SHARDS = 2
ONE_SLICE = torch.arange(3, 20)  # trained rows in the first half of the sequence only
PROBLEMS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "no padding": {"vocab_size": 56},
    "a shard of padding alone": {"vocab_size": 20},
    "a shard that holds no target": {"highest_label": 28},
    "a slice without trained rows": {"trained": ONE_SLICE},
    "no trained token": {"trained": torch.empty(0, dtype=torch.int64)},
    "one trained token": {"trained": torch.tensor([39])},
}
CHUNKS = [1, 7, "T-1", "T+9"]
CASES = [(name, chunk, sp) for name in PROBLEMS for chunk in CHUNKS for sp in (False, True)]


def problem_of(name: str) -> Problem:
    return random_problem(**PROBLEMS[name])


def chunk_of(problem: Problem, chunk: int | str) -> int:
    relative = {"T-1": max(len(problem.trained) - 1, 1), "T+9": len(problem.trained) + 9}
    return chunk if isinstance(chunk, int) else relative[chunk]


class LargestShapes(TorchDispatchMode):
    """Notes the shape of every two-dimensional tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                self.shapes.add(tuple(tensor.shape))
        return result


def count_collectives(problem: Problem, group: dist.ProcessGroup, sequence_parallel: bool) -> dict[str, int]:
    """How often the layer calls each collective in one forward and backward over chunks of 7."""
    names: tuple[str, ...] = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor")
    counts: dict[str, int] = dict.fromkeys(names, 0)
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, counting(name))
        layer_answer(problem, chunk_tokens=7, group=group, sequence_parallel=sequence_parallel)
    finally:
        for name in names:
            setattr(dist, name, originals[name])
    return counts


def on_each_rank(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    answers: dict[Any, Answer] = {}
    for name, chunk, sp in CASES:
        problem = problem_of(name)
        chunk_tokens = chunk_of(problem, chunk)
        answers[name, chunk, sp] = layer_answer(
            problem, chunk_tokens=chunk_tokens, group=group, sequence_parallel=sp
        )
    plain = problem_of("plain")
    with LargestShapes() as watch:
        layer_answer(plain, chunk_tokens=7, group=group)
    rounded = bfloat16_problem()
    answers["bfloat16"] = layer_answer(rounded, chunk_tokens=7, group=group, dtype=torch.bfloat16)
    measured = Statistics.of({"kl": torch.tensor([1.0, 3.0])}) if rank == 1 else Statistics.empty(())
    return {
        "answers": answers,
        "logp": {sp: score(plain, group, sp) for sp in (False, True)},
        "shapes": watch.shapes,
        "collectives": {sp: count_collectives(plain, group, sp) for sp in (False, True)},
        "metrics": report(merge_over_ranks(measured, QUANTITIES, group)),
    }


def score(
    problem: Problem, group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rank, size = group.rank(), group.size()
    hidden, rows = problem.hidden, TrainedRows(problem.trained, (len(problem.trained),))
    if sequence_parallel:
        hidden, rows = hidden.chunk(size)[rank], local_rows(problem.trained, len(problem.hidden), size, rank)
    return vocab_parallel_logp(
        hidden,
        problem.weight.chunk(size)[rank],
        rows,
        problem.fields.labels,
        vocab_size=problem.vocab_size,
        temperature=problem.temperature,
        tp_group=group,
        sequence_parallel=sequence_parallel,
        chunk_tokens=7,
    )


def bfloat16_problem() -> Problem:
    problem = random_problem(scale=0.5)
    return replace(
        problem, hidden=problem.hidden.bfloat16().float(), weight=problem.weight.bfloat16().float()
    )


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, NUM_SHARDS)


def whole(answers: list[Answer], sequence_parallel: bool) -> Answer:
    """Both ranks' parts put together; what must be equal on them is checked to be."""
    first, second = answers
    for name in ("loss", "logp", "entropy"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    hidden_grad = first.hidden_grad
    if sequence_parallel:
        hidden_grad = torch.cat([first.hidden_grad, second.hidden_grad])
    else:
        assert torch.equal(first.hidden_grad, second.hidden_grad)
    weight_grad = torch.cat([first.weight_grad, second.weight_grad])
    return replace(first, hidden_grad=hidden_grad, weight_grad=weight_grad)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("sp", [False, True], ids=["replicated", "sequence parallel"])
def test_agrees_with_the_reference(ranks: list[dict[str, Any]], name: str, sp: bool):
    problem = problem_of(name)
    expected = reference_answer(problem)
    for chunk in CHUNKS:
        found = whole([rank["answers"][name, chunk, sp] for rank in ranks], sp)
        assert_agree(found, expected)
        assert found.weight_grad[problem.vocab_size :].abs().sum() == 0


def test_bfloat16(ranks: list[dict[str, Any]]):
    found = whole([rank["answers"]["bfloat16"] for rank in ranks], sequence_parallel=False)
    tolerances = within(2e-2, "logp", "entropy", "hidden_grad", "weight_grad")
    assert_agree(found, reference_answer(bfloat16_problem()), tolerances)


@pytest.mark.parametrize("sp", [False, True])
def test_scoring_gives_the_trained_log_probs_to_the_bit(ranks: list[dict[str, Any]], sp: bool):
    for rank in ranks:
        logp, entropy = rank["logp"][sp]
        trained = rank["answers"]["plain", 7, sp]
        assert torch.equal(logp, trained.logp)
        assert torch.equal(entropy, trained.entropy)


def test_no_rank_ever_holds_a_row_of_the_whole_vocabulary(ranks: list[dict[str, Any]]):
    for rank, true_columns in zip(ranks, (28, 25), strict=True):
        assert (7, true_columns) in rank["shapes"]  # a chunk of the shard's logits
        assert not [shape for shape in rank["shapes"] if {53, 56} & set(shape) and shape != (56, 16)]
        num_tokens = len(problem_of("plain").trained)
        assert not [shape for shape in rank["shapes"] if shape[0] >= num_tokens and 25 <= shape[1] <= 28]


@pytest.mark.parametrize("sp", [False, True])
def test_one_collective_per_chunk_and_one_for_the_hidden_gradient(ranks: list[dict[str, Any]], sp: bool):
    num_chunks = -(-len(problem_of("plain").trained) // 7)
    for rank in ranks:
        assert rank["collectives"][sp] == {
            "all_gather_into_tensor": num_chunks + sp,  # sequence parallelism gathers the rows first
            "all_reduce": int(not sp),
            "reduce_scatter_tensor": int(sp),
        }


def test_statistics_merge_over_ranks_of_which_some_have_none(ranks: list[dict[str, Any]]):
    assert [rank["metrics"] for rank in ranks] == [{"ppo_actor/update/kl/avg": 2.0}] * 2
