"""The elementwise part of a sweep: plain torch against float64, and the GPU's kernels in Triton's interpreter.

The interpreter executes a kernel's operations on the CPU with numpy. It shows that the arithmetic and the masks are
right, not that the kernel compiles for a GPU or is fast there.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_a3po.vocab_parallel import exponentials

ROOT = Path(__file__).parents[2]
SHAPES = [(1, 1), (3, 7), (5, 4096), (4, 5000)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def logits_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    logits = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = torch.finfo(dtype).min  # as at a target
    return logits.to(dtype)


def error_of(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs() / expected.abs().clamp(min=1)).max().item()


@shapes
@dtypes
def test_plain_torch(shape: tuple[int, int], dtype: torch.dtype):
    check(exponentials, logits_of(shape, dtype))


def check(module: object, logits: Tensor) -> None:
    """All three functions of `module` on a copy of the logits, against float64."""
    exact, tolerance = logits.double(), 3e-6 if logits.dtype == torch.float32 else 1e-2
    shifted = exact - exact.amax(1, keepdim=True)
    expected = shifted.exp()

    buffer, numbers = logits.clone(), torch.zeros(3, len(logits))
    module.exponentiate_(buffer, numbers)  # pyright: ignore[reportAttributeAccessIssue]
    assert error_of(buffer, expected) <= tolerance
    sums = torch.stack([exact.amax(1), expected.sum(1), torch.nan_to_num(expected * shifted).sum(1)])
    assert error_of(numbers, sums) <= tolerance

    factor, slope = torch.randn(len(logits)), torch.randn(len(logits))
    log = torch.where(buffer > 0, buffer, 1).double().log()
    gradient = (factor[:, None] + slope[:, None] * log) * buffer.double()
    module.add_entropy_gradient_(buffer, factor, slope)  # pyright: ignore[reportAttributeAccessIssue]
    assert error_of(buffer, gradient) <= tolerance

    buffer, offset = logits.clone(), numbers[0] + 2.0
    module.exponentiate_at_(buffer, offset)  # pyright: ignore[reportAttributeAccessIssue]
    assert error_of(buffer, (exact - offset[:, None].double()).exp()) <= tolerance


@pytest.mark.skipif(find_spec("triton") is None, reason="no GPU: Triton, which comes with torch's CUDA build")
def test_triton_kernels_in_the_interpreter():
    program = (
        "import torch\n"
        "from megatron_a3po.vocab_parallel import triton_kernels\n"
        "from tests.vocab_parallel.test_exponentials import SHAPES, check, logits_of\n"
        "for shape in SHAPES:\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        check(triton_kernels, logits_of(shape, dtype))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
