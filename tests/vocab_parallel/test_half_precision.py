"""What a GPU does with a bfloat16 weight, on a CPU: half-precision factors, float32 results.

A CPU has no such products. Here they are made in float32 from the same rounded factors, for whatever asks torch for
them; everything around them is the layer's own code, part by part and chunk by chunk.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_a3po.vocab_parallel import projection, sweep
from tests.vocab_parallel.problem import Problem, assert_agree, layer_answer, random_problem, reference_answer
from tests.vocab_parallel.test_one_shard import Sweeps, both_sweeps
from tests.vocab_parallel.test_precision import in_bfloat16

aten = torch.ops.aten
# Largest errors over the largest reference value. The gradients' are bfloat16's own, of exponentials and rows.
BOUNDS = {"loss": 1e-6, "logp": 1e-6, "entropy": 5e-6, "hidden_grad": 4e-3, "weight_grad": 4e-3}


class Products(TorchDispatchMode):
    """Products of half-precision factors with a float32 result; and who multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype_out):
            return func(*args, **kwargs)
        *tensors, out_dtype = args
        factors = tensors[-2:]
        assert out_dtype == torch.float32
        assert all(factor.dtype == torch.bfloat16 for factor in factors)
        self.made.append(str(func))
        product = factors[0].float() @ factors[1].float()
        if func is aten.addmm.dtype_out:
            product += tensors[0]
        return product if func is aten.mm.dtype else kwargs["out"].copy_(product)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    def dtype_of(weight: Tensor) -> torch.dtype:
        return weight.dtype

    monkeypatch.setattr(projection, "arithmetic_dtype", dtype_of)
    monkeypatch.setattr(sweep, "arithmetic_dtype", dtype_of)
    monkeypatch.setattr(projection, "PART_TOKENS", 3)
    with Products() as products:
        yield products


def large_problem(**options: Any) -> Problem:
    """Logits up to some 17, as many terms to a sum as make roundings average out where they can."""
    return in_bfloat16(
        random_problem(num_rows=300, hidden=256, vocab_size=1003, padded_vocab=1003, scale=0.2, **options)
    )


@both_sweeps
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_values_are_float32s_and_gradients_bfloat16s(
    as_on_a_gpu: Products, sweeps: Sweeps, temperature: Any, entropy_coef: float
):
    problem = large_problem(temperature=temperature, entropy_coef=entropy_coef)
    assert (problem.hidden @ problem.weight.T).abs().max() > 14
    answer = layer_answer(problem, chunk_tokens=70, dtype=torch.bfloat16, sweeps=sweeps)
    assert set(as_on_a_gpu.made) == {"aten.mm.dtype", "aten.mm.dtype_out", "aten.addmm.dtype_out"}
    assert_agree(answer, reference_answer(problem), BOUNDS)
