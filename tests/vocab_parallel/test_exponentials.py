"""The elementwise part of a sweep: plain torch against float64, and the GPU's kernels in Triton's interpreter.

The interpreter executes a kernel's operations on the CPU with numpy. It shows that the arithmetic and the masks are
right, not that the kernel compiles for a GPU or is fast there.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_a3po.vocab_parallel import exponentials
from megatron_a3po.vocab_parallel.shard_softmax import FAR_BELOW
from tests.conftest import NO_TRITON

ROOT = Path(__file__).parents[2]
SHAPES = [(1, 1), (3, 7), (5, 4096), (4, 5000)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def error_of(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs() / expected.abs().clamp(min=1)).max().item()


@shapes
@dtypes
@pytest.mark.parametrize("scaled", [False, True])
def test_plain_torch(shape: tuple[int, int], dtype: torch.dtype, scaled: bool):
    check(exponentials, shape, dtype, scaled)


def check(module: Any, shape: tuple[int, int], dtype: torch.dtype, scaled: bool) -> None:
    """All three functions of `module`, against float64; the sums are of what is not rounded yet."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, generator=generator)
    logits[:, 0] = FAR_BELOW  # as at a target
    scale = 0.3 + torch.rand(len(logits), generator=generator) if scaled else None
    exact = logits.double() if scale is None else logits.double() * scale.double()[:, None]
    shifted = exact - exact.amax(1, keepdim=True)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-2

    def output_of(buffer: Tensor) -> Tensor:
        return buffer if dtype == torch.float32 else torch.zeros(shape, dtype=dtype)

    buffer, numbers = logits.clone(), torch.zeros(3, len(logits))
    output = output_of(buffer)
    module.exponentiate_(buffer, output, numbers, scale)
    assert error_of(output, shifted.exp()) <= tolerance
    sums = torch.stack([exact.amax(1), shifted.exp().sum(1), (shifted.exp() * shifted).sum(1)])
    assert error_of(numbers, sums) <= 3e-6

    factor, slope = torch.randn(len(logits)), torch.randn(len(logits))
    log = torch.where(output > 0, output, 1).double().log()
    gradient = (factor[:, None] + slope[:, None] * log) * output.double()
    module.add_entropy_gradient_(output, factor, slope)
    assert error_of(output, gradient) <= tolerance

    buffer, offset = logits.clone(), numbers[0].clamp(min=-100) + 2.0
    output = output_of(buffer)
    module.exponentiate_at_(buffer, output, offset, scale)
    assert error_of(output, (exact - offset[:, None].double()).exp()) <= tolerance


@pytest.mark.skipif(find_spec("triton") is None, reason=NO_TRITON)
def test_triton_kernels_in_the_interpreter():
    program = (
        "import torch\n"
        "from megatron_a3po.vocab_parallel import triton_kernels\n"
        "from tests.vocab_parallel.test_exponentials import SHAPES, check\n"
        "for shape in SHAPES:\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        for scaled in (False, True):\n"
        "            check(triton_kernels, shape, dtype, scaled)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
