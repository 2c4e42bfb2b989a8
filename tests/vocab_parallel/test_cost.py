"""What a call costs on one rank: flops, memory, and how long its chunks are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_a3po.vocab_parallel import (
    TokenFields,
    TrainedRows,
    choose_chunk_tokens,
    vocab_parallel_logp,
    vocab_parallel_loss,
)
from tests.vocab_parallel.problem import OBJECTIVE
from tests.vocab_parallel.test_one_shard import ALONE, Sweeps, both_sweeps
from tools.peak_memory import peak_bytes

HIDDEN, VOCAB, CHUNK = 32, 4096, 64
BYTES = 4


def call(num_tokens: int, sweeps: Sweeps = 1, **options: Any) -> Callable[[], None]:
    """Forward and backward on `num_tokens` trained tokens of twice as many rows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * num_tokens, HIDDEN, generator=generator, requires_grad=True)
    weight: Any = torch.randn(VOCAB, HIDDEN, generator=generator).mul_(0.1).requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    rows = TrainedRows(torch.arange(0, 2 * num_tokens, 2), (num_tokens,))
    fields = fields_of(num_tokens)

    def run() -> None:
        output = vocab_parallel_loss(
            hidden,
            weight,
            rows,
            fields,
            OBJECTIVE,
            vocab_size=VOCAB,
            chunk_tokens=CHUNK,
            sweeps=sweeps,
            **ALONE | options,
        )
        torch.autograd.grad(output.loss, (hidden, weight))

    return run


def fields_of(num_tokens: int) -> TokenFields:
    ones = torch.ones(num_tokens)
    labels = torch.arange(num_tokens) % VOCAB
    return TokenFields(labels, -8 * ones, ones.int(), ones, ones)


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize(("sweeps", "factor"), [(1, 6), (2, 8)])
def test_flops_are_those_of_the_products_on_trained_tokens(sweeps: Any, factor: int, entropy_coef: float):
    num_tokens = 150
    found = flops(call(num_tokens, sweeps, entropy_coef=entropy_coef))
    assert found == factor * num_tokens * HIDDEN * VOCAB


@both_sweeps
def test_without_gradient_there_is_one_product(sweeps: Sweeps):
    num_tokens = 150
    with torch.no_grad():
        hidden, weight = torch.randn(num_tokens, HIDDEN), torch.randn(VOCAB, HIDDEN)
        rows, fields = TrainedRows(torch.arange(num_tokens), (num_tokens,)), fields_of(num_tokens)
        settings: dict[str, Any] = {"vocab_size": VOCAB, "chunk_tokens": CHUNK, **ALONE}
        one_product = 2 * num_tokens * HIDDEN * VOCAB
        scoring = flops(lambda: vocab_parallel_logp(hidden, weight, rows, fields.labels, **settings))
        evaluating = flops(
            lambda: vocab_parallel_loss(hidden, weight, rows, fields, OBJECTIVE, sweeps=sweeps, **settings)
        )
    assert scoring == evaluating == one_product


def extra_memory(num_tokens: int, sweeps: Sweeps, **options: Any) -> int:
    """Peak bytes beyond the hidden states' gradient; the weight's is the main gradient."""
    return peak_bytes(call(num_tokens, sweeps, **options)) - BYTES * HIDDEN * 2 * num_tokens


@both_sweeps
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"entropy_coef": 0.1}], ids=str)
def test_memory_is_one_chunk_whatever_the_number_of_tokens(options: dict[str, Any], sweeps: Sweeps):
    chunk = BYTES * CHUNK * VOCAB
    once, twice = (extra_memory(num_tokens, sweeps, **options) for num_tokens in (8 * CHUNK, 16 * CHUNK))
    num_vectors = (twice - once) / (BYTES * 8 * CHUNK)
    assert num_vectors <= 16  # a few [trained] vectors, and not a row of 32
    # Beyond the chunk: rows of [chunk, hidden] and a block of the softmax's rows.
    rows_and_scratch = 6 * BYTES * CHUNK * HIDDEN + (1 << 19)
    assert once <= chunk + rows_and_scratch + 20 * BYTES * 8 * CHUNK


def test_no_operation_makes_a_second_chunk_of_logits():
    largest: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = result if isinstance(result, tuple | list) else (result,)
            storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            for tensor in made:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                    largest.append(tensor.untyped_storage().nbytes())
            return result

    run = call(8 * CHUNK)
    with Watch():
        run()
    assert sum(size >= BYTES * CHUNK * VOCAB // 2 for size in set(largest) - {BYTES * HIDDEN * VOCAB}) == 1


def test_chunks_are_long_where_the_workspace_allows_and_never_too_short():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_chunk_tokens(128, 64, cpu) == 2048
    assert choose_chunk_tokens(1024, 32768, cpu) == 1920
    assert choose_chunk_tokens(4096, 151936, cpu) == 384
    assert choose_chunk_tokens(8192, 10**6, cpu) == 256
    assert choose_chunk_tokens(4096, 151936, cuda) == 6656
    assert choose_chunk_tokens(4096, 151936 // 8, cuda) == 16384
