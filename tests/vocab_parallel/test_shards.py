"""The loss layer over vocabulary shards on two and four real gloo ranks, against the float64 reference.

The ranks are started once per number of shards; they run every case and hand their answers back, the parent compares.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_a3po.vocab_parallel import TrainedRows, vocab_parallel_logp
from megatron_a3po.vocab_parallel.trained_rows import row_exchange
from tests.distributed.ranks import run_ranks
from tests.vocab_parallel.problem import (
    OBJECTIVES,
    SEQUENCE_OBJECTIVES,
    TOLERANCES,
    Answer,
    Problem,
    assert_agree,
    layer_answer,
    part_of,
    random_problem,
    reference_answer,
    within,
)
from tests.vocab_parallel.test_cost import flops

ONE_SLICE = torch.arange(3, 20)  # trained rows in the first half of the sequence only
PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "a temperature per token": {"temperature": "per token"},
    "no padding": {"vocab_size": 56},
    "a shard of padding alone": {"vocab_size": 20},
    "a shard that holds no target": {"highest_label": 28},
    "a slice without trained rows": {"trained": ONE_SLICE},
    "a slice of one trained row": {"trained": torch.cat([ONE_SLICE, torch.tensor([31])])},
    "a shard of padding alone, with an entropy term": {"vocab_size": 20, "entropy_coef": 0.05},
    "no trained token": {"trained": torch.empty(0, dtype=torch.int64)},
    "one trained token": {"trained": torch.tensor([39])},
    "with an entropy term": {"entropy_coef": 0.05},
    "large logits": {"scale": 20.0},
}
# What the one call for any trainer is tried on; the last has an entropy term and a cap on the weight.
PUBLIC = ("a temperature per token", "a slice of one trained row", "weight masked")
CHUNKS = (1, 7, "T-1", "T+9")
SHARDS = (2, 4)
Case = tuple[str, int | str, bool, Literal[1, 2]]
CASES: list[Case] = [
    (name, chunk, sp, sweeps)
    for name in PROBLEMS
    for chunk in CHUNKS
    for sp in (False, True)
    for sweeps in ((1, 2) if chunk == 7 else (1,))
]
OBJECTIVE_CASES: list[Case] = [
    (name, 7, sp, 2 if name in SEQUENCE_OBJECTIVES else 1)
    for name in (*OBJECTIVES, *SEQUENCE_OBJECTIVES)
    for sp in (False, True)
]
shards = pytest.mark.parametrize("num_shards", SHARDS)
layouts = pytest.mark.parametrize("sp", [False, True], ids=["replicated", "sequence parallel"])


def problem_of(name: str) -> Problem:
    if name in PROBLEMS:
        return random_problem(**PROBLEMS[name])
    return random_problem(objective=(OBJECTIVES | SEQUENCE_OBJECTIVES)[name], entropy_coef=0.02)


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
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2:
                self.shapes.add(tuple(tensor.shape))
        return result


def collectives_of(run: Callable[[], Any]) -> list[str]:
    """The collectives `run` starts, in order."""
    names = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor")
    started: list[str] = []
    originals = {name: getattr(dist, name) for name in names}

    def noting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert kwargs["async_op"]  # none of them makes the host wait where it is started
            started.append(name)
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, noting(name))
        run()
    finally:
        for name in names:
            setattr(dist, name, originals[name])
    return started


def on_each_rank(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    answers: dict[Any, Answer] = {}
    for case in CASES + OBJECTIVE_CASES:
        name, chunk, sp, sweeps = case
        problem = problem_of(name)
        answers[case] = layer_answer(
            problem,
            chunk_tokens=chunk_of(problem, chunk),
            group=group,
            sequence_parallel=sp,
            sweeps=sweeps,
        )
    plain, answered = problem_of("plain"), {"chunk_tokens": 7, "group": group}
    shapes = {}
    for sp in (False, True):
        with LargestShapes() as watch:
            layer_answer(plain, **answered, sequence_parallel=sp)
        shapes[sp] = watch.shapes
    rounded = bfloat16_problem()
    for sp in (False, True):
        answers["bfloat16", sp] = layer_answer(
            rounded, **answered, sequence_parallel=sp, dtype=torch.bfloat16
        )
    return {
        "answers": answers,
        "logp": {sp: score(plain, group, sp) for sp in (False, True)},
        "shapes": shapes,
        "collectives": {
            (sp, sweeps): collectives_of(
                lambda sp=sp, sweeps=sweeps: layer_answer(
                    plain, **answered, sequence_parallel=sp, sweeps=sweeps
                )
            )
            for sp in (False, True)
            for sweeps in (1, 2)
        },
        "flops": {
            sp: flops(lambda sp=sp: layer_answer(plain, **answered, sequence_parallel=sp))
            for sp in (False, True)
        },
        "public": {
            (name, sp): layer_answer(problem_of(name), **answered, sequence_parallel=sp, public=True)
            for name in PUBLIC
            for sp in (False, True)
        },
    }


def score(problem: Problem, group: dist.ProcessGroup, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    return vocab_parallel_logp(
        *part_of(problem, group, sequence_parallel),
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


Ranks = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    done: dict[int, list[dict[str, Any]]] = {}

    def run(num_shards: int) -> list[dict[str, Any]]:
        if num_shards not in done:
            done[num_shards] = run_ranks(on_each_rank, num_shards, timeout_s=240)
        return done[num_shards]

    return run


def whole(answers: list[Answer], sequence_parallel: bool) -> Answer:
    """All ranks' parts put together; what must be equal on them is checked to be."""
    first = answers[0]
    for name in (
        ("loss", "logp", "entropy") if sequence_parallel else ("loss", "logp", "entropy", "hidden_grad")
    ):
        assert all(torch.equal(getattr(first, name), getattr(other, name)) for other in answers), name
    weight_grad = torch.cat([answer.weight_grad for answer in answers])
    if not sequence_parallel:
        return replace(first, weight_grad=weight_grad)
    hidden_grad = torch.cat([answer.hidden_grad for answer in answers])
    return replace(first, hidden_grad=hidden_grad, weight_grad=weight_grad)


@shards
@layouts
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_reference(ranks: Ranks, name: str, sp: bool, num_shards: int):
    problem = problem_of(name)
    expected = reference_answer(problem)
    largest = (problem.hidden @ problem.weight.T).abs().max().item()
    for case in CASES:
        if case[0] == name and case[2] == sp:
            found = whole([rank["answers"][case] for rank in ranks(num_shards)], sp)
            if largest < 10:
                assert_agree(found, expected)
            elif len(found.logp):
                assert (found.logp - expected.logp).abs().max() <= 4e-7 * largest
                assert_agree(found, expected, within(1e-6 * largest, "hidden_grad", "weight_grad"))
            assert found.weight_grad[problem.vocab_size :].abs().sum() == 0


@settings(max_examples=25, derandomize=True)
@given(
    num_shards=st.sampled_from(SHARDS),
    rows_per_rank=st.integers(1, 9),
    hidden=st.integers(1, 20),
    vocab_per_rank=st.integers(1, 17),
    padding=st.integers(0, 9),
    chunk_tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
    sp=st.booleans(),
    sweeps=st.sampled_from([1, 2]),
)
def test_agrees_whatever_the_shapes(
    num_shards: int,
    rows_per_rank: int,
    hidden: int,
    vocab_per_rank: int,
    padding: int,
    chunk_tokens: int,
    seed: int,
    sp: bool,
    sweeps: Literal[1, 2],
):
    padded = num_shards * vocab_per_rank
    problem = random_problem(
        num_rows=num_shards * rows_per_rank,
        hidden=hidden,
        vocab_size=max(2, padded - padding),
        padded_vocab=padded,
        scale=0.5,
        seed=seed,
        entropy_coef=0.1,
    )

    def answer_of_rank(rank: int, world_size: int) -> Answer:
        group = dist.group.WORLD
        return layer_answer(
            problem, chunk_tokens=chunk_tokens, group=group, sequence_parallel=sp, sweeps=sweeps
        )

    found = whole(run_ranks(answer_of_rank, num_shards), sp)
    assert_agree(found, reference_answer(problem), dict(TOLERANCES))
    assert found.weight_grad[problem.vocab_size :].abs().sum() == 0


@shards
@layouts
def test_every_objective(ranks: Ranks, sp: bool, num_shards: int):
    for case in OBJECTIVE_CASES:
        if case[2] == sp:
            found = whole([rank["answers"][case] for rank in ranks(num_shards)], sp)
            assert_agree(found, reference_answer(problem_of(case[0])))


@shards
@layouts
def test_bfloat16(ranks: Ranks, sp: bool, num_shards: int):
    found = whole([rank["answers"]["bfloat16", sp] for rank in ranks(num_shards)], sp)
    tolerances = within(5e-6, "loss", "logp", "entropy") | within(1e-2, "hidden_grad", "weight_grad")
    assert_agree(found, reference_answer(bfloat16_problem()), tolerances)


@shards
@layouts
def test_scoring_gives_the_trained_log_probs_to_the_bit(ranks: Ranks, sp: bool, num_shards: int):
    for rank in ranks(num_shards):
        logp, entropy = rank["logp"][sp]
        for sweeps in (1, 2):
            trained = rank["answers"]["plain", 7, sp, sweeps]
            assert torch.equal(logp, trained.logp)
            assert torch.equal(entropy, trained.entropy)


@shards
@layouts
def test_no_rank_ever_holds_a_row_of_the_whole_vocabulary(ranks: Ranks, sp: bool, num_shards: int):
    size, num_tokens = 56 // num_shards, len(problem_of("plain").trained)
    for rank_number, rank in enumerate(ranks(num_shards)):
        true_columns, shapes = min(size, 53 - rank_number * size), rank["shapes"][sp]
        assert [shape for shape in shapes if shape[1] == true_columns]  # a chunk of the shard's logits
        assert not [shape for shape in shapes if {53, 56} & set(shape) and shape != (56, 16)]
        assert not [shape for shape in shapes if shape[0] >= num_tokens and shape[1] in (true_columns, size)]


@shards
def test_no_rank_gathers_more_rows_than_a_chunk(ranks: Ranks, num_shards: int):
    num_tokens = len(problem_of("plain").trained)
    for rank in ranks(num_shards):
        rows = {shape[0] for shape in rank["shapes"][True] if shape[1] == 16}
        size = 56 // num_shards
        own = {40, 40 // num_shards, 56, size, 53 % size}  # what it has anyway
        assert max(rows - own, default=0) <= 7 + num_shards - 1 < num_tokens


@shards
@layouts
def test_one_collective_per_chunk_for_the_numbers(ranks: Ranks, sp: bool, num_shards: int):
    num_chunks = -(-len(problem_of("plain").trained) // 7)
    returned = "reduce_scatter_tensor" if sp else "all_reduce"
    for rank in ranks(num_shards):
        started = rank["collectives"][sp, 1]
        # Numbers, and under sequence parallelism rows: to every rank. Hidden gradients: back.
        assert started.count("all_gather_into_tensor") == num_chunks * (2 if sp else 1)
        assert started.count(returned) == num_chunks
        assert len(started) == num_chunks * (3 if sp else 2)
        assert rank["collectives"][sp, 2].count("all_gather_into_tensor") == num_chunks * (3 if sp else 1)


@shards
@layouts
def test_flops_are_those_of_the_products_on_the_shard(ranks: Ranks, sp: bool, num_shards: int):
    size, num_tokens = 56 // num_shards, len(problem_of("plain").trained)
    for rank_number, rank in enumerate(ranks(num_shards)):
        true_columns = min(size, 53 - rank_number * size)
        assert rank["flops"][sp] == 6 * num_tokens * 16 * true_columns


def test_one_shard_needs_no_collective():
    assert collectives_of(lambda: layer_answer(problem_of("plain"), chunk_tokens=7)) == []


@pytest.mark.parametrize("counts", [(10, 10), (17, 0), (1, 0, 16, 3), (0, 0), (1, 1)])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_chunks_take_every_token_once_and_an_even_share_of_each_rank(
    counts: tuple[int, ...], chunk_tokens: int
):
    rows = replace(part_of(problem_of("plain"), None, False)[2], counts=counts)
    exchange = row_exchange(torch.zeros(40, 1), rows, None, sequence_parallel=True, differentiate=False)
    spans = exchange.spans(chunk_tokens)
    seen = torch.cat([torch.arange(sum(counts))[span.tokens] for span in spans] or [torch.arange(0)])
    assert sorted(seen.tolist()) == list(range(sum(counts)))
    for span in spans:
        assert 1 <= span.size == len(seen[span.tokens]) <= chunk_tokens + len(counts) - 1
        shares = [len(part) * len(spans) - count for part, count in zip(span.parts, counts, strict=True)]
        assert max(map(abs, shares)) < 2 * len(spans) or chunk_tokens < len(counts)


@shards
@layouts
@pytest.mark.parametrize("name", PUBLIC)
def test_the_call_for_other_trainers_agrees_too(ranks: Ranks, name: str, sp: bool, num_shards: int):
    answers = [rank["public"][name, sp] for rank in ranks(num_shards)]
    assert all(answer.metrics == answers[0].metrics for answer in answers)
    assert_agree(whole(answers, sp), reference_answer(problem_of(name), public=True))


def test_rows_of_slices_from_their_masks():
    masks = torch.tensor([[True, False, True], [False, False, False]])
    first, second = (TrainedRows.of_masks(masks, tp_rank) for tp_rank in (0, 1))
    assert (first.local.tolist(), second.local.tolist()) == ([0, 2], [])
    assert first.counts == second.counts == (2, 0)
