"""Context parallelism to the loss layer: ranks that hold tokens of their own, each computed once.

Four ranks, two on the tensor axis times two on the context axis, which has the rows of a sequence in Megatron-Core's
order: first and last quarter, the two in the middle. What the context ranks find is put together by the parent.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.vocab_parallel.problem import Answer, Problem, layer_answer, random_problem, reference_answer

QUARTERS = ((0, 3), (1, 2))
TRAINED = {
    "trained tokens on both": None,
    "none on the second": torch.tensor([0, 3, 9, 31, 38]),
}


def rows_of_context_rank(cp_rank: int, num_rows: int) -> Tensor:
    quarters = torch.arange(num_rows).chunk(4)
    return torch.cat([quarters[quarter] for quarter in QUARTERS[cp_rank]])


def part_of_context_rank(problem: Problem, cp_rank: int) -> tuple[Problem, Tensor, Tensor]:
    """(its problem, its rows, which of the trained tokens are its own)."""
    rows = rows_of_context_rank(cp_rank, len(problem.hidden))
    place = torch.full((len(problem.hidden),), -1)
    place[rows] = torch.arange(len(rows))
    here = (place[problem.trained] >= 0).nonzero()[:, 0]
    tokens = here[place[problem.trained[here]].argsort()]
    own = replace(
        problem,
        hidden=problem.hidden[rows],
        trained=place[problem.trained[tokens]],
        fields=problem.fields.take(tokens),
    )
    return own, rows, tokens


def on_each_rank(rank: int, world_size: int, sequence_parallel: bool) -> dict[str, Answer]:
    groups: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    cp_rank = rank // 2
    return {
        name: layer_answer(
            part_of_context_rank(random_problem(trained=trained), cp_rank)[0],
            chunk_tokens=5,
            group=groups[cp_rank],
            sequence_parallel=sequence_parallel,
        )
        for name, trained in TRAINED.items()
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_token_is_computed_by_one_context_rank_and_their_sum_is_the_whole(sequence_parallel: bool):
    ranks = run_ranks(on_each_rank, 4, sequence_parallel)
    for name, trained in TRAINED.items():
        problem = random_problem(trained=trained)
        expected, first, second = reference_answer(problem), ranks[0][name], ranks[2][name]
        loss = first.loss + second.loss
        assert abs(loss - expected.loss) <= 1e-6 * expected.loss_size
        weight_grad = sum(
            torch.cat([ranks[cp_rank * 2 + tp_rank][name].weight_grad for tp_rank in (0, 1)])
            for cp_rank in (0, 1)
        )
        assert close(weight_grad, expected.weight_grad)
        for cp_rank in (0, 1):
            _, rows, tokens = part_of_context_rank(problem, cp_rank)
            parts = [ranks[cp_rank * 2 + tp_rank][name] for tp_rank in (0, 1)]
            slices = [part.hidden_grad for part in parts]
            hidden_grad = torch.cat(slices) if sequence_parallel else slices[0]
            assert close(hidden_grad, expected.hidden_grad[rows], of=expected.hidden_grad)
            assert close(parts[0].logp, expected.logp[tokens], of=expected.logp, to=1e-6)


def close(found: Tensor | int, expected: Tensor, of: Tensor | None = None, to: float = 5e-6) -> bool:
    """To a share of the largest value of `of`."""
    size = (expected if of is None else of).abs().max()
    return bool((torch.as_tensor(found) - expected).abs().max() <= to * size) if expected.numel() else True
