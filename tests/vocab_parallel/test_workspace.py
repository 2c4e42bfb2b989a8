"""The buffer of logits that a caller keeps: the same numbers, and its memory only while it is wanted."""

from dataclasses import fields

import torch
from torch import Tensor

from megatron_a3po.vocab_parallel import Workspace
from tests.vocab_parallel.problem import Answer, layer_answer, random_problem
from tests.vocab_parallel.test_one_shard import both_sweeps
from tools.peak_memory import peak_bytes

CPU = torch.device("cpu")


def same(one: Answer, other: Answer) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Answer)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@both_sweeps
def test_calls_of_any_size_through_one_workspace_are_those_of_their_own(sweeps: int):
    kept = Workspace()
    for num_rows, vocab_size, padded in ((40, 53, 56), (7, 53, 56), (60, 90, 90), (40, 53, 56)):
        problem = random_problem(num_rows=num_rows, vocab_size=vocab_size, padded_vocab=padded)
        alone, together = (
            layer_answer(problem, chunk_tokens=5, sweeps=sweeps, workspace=workspace)  # pyright: ignore[reportArgumentType]
            for workspace in (None, kept)
        )
        assert same(alone, together)


def test_the_buffer_grows_to_the_largest_call_and_goes_when_released():
    workspace = Workspace()
    small = workspace.take(8, 16, torch.float32, CPU)
    assert workspace.take(4, 32, torch.float32, CPU).data_ptr() == small.data_ptr()
    large = workspace.take(9, 16, torch.float32, CPU)
    assert large.shape == (9, 16)
    assert workspace.take(8, 16, torch.float32, CPU).data_ptr() == large.data_ptr()
    assert workspace.take(8, 16, torch.float64, CPU).dtype == torch.float64
    del small, large
    assert peak_bytes(lambda: workspace.take(8, 16, torch.float64, CPU), CPU) == 0
    workspace.release()
    assert peak_bytes(lambda: workspace.take(8, 16, torch.float64, CPU), CPU) == 8 * 16 * 8
