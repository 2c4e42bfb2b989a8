"""The elementwise part of a sweep on a GPU: one kernel over float32 logits, a program per row.

The same functions as the plain torch of `exponentials`, which is their reference: a test runs these kernels in Triton's
interpreter beside it. What they store is of the weight's precision; all arithmetic is float32. Loaded only where there
are a GPU and Triton. The second read of a row comes from the cache for the most part.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # of a row at a time


def exponentiate_(logits: Tensor, exponentials: Tensor, numbers: Tensor, scale: Tensor | None = None) -> None:
    """exponentials <- exp(z - max); numbers <- max, sum exp(z - max), sum exp(z - max) (z - max) of each row."""
    num_rows, num_columns = logits.shape
    strides = logits.stride(0), exponentials.stride(0), numbers.stride(0)
    _exponentiate[(num_rows,)](
        logits, exponentials, numbers, scale, num_columns, *strides, **_launch(num_columns)
    )


def exponentiate_at_(
    logits: Tensor, exponentials: Tensor, offset: Tensor, scale: Tensor | None = None
) -> None:
    """exponentials <- exp(scale * logits - offset)."""
    num_rows, num_columns = logits.shape
    strides = logits.stride(0), exponentials.stride(0)
    _exponentiate_at[(num_rows,)](
        logits, exponentials, offset, scale, num_columns, *strides, **_launch(num_columns)
    )


def add_entropy_gradient_(exponentials: Tensor, factor: Tensor, slope: Tensor) -> None:
    """E <- (factor + slope * log E) * E, and 0 where E is 0."""
    num_rows, num_columns = exponentials.shape
    _add_entropy_gradient[(num_rows,)](
        exponentials, factor, slope, num_columns, exponentials.stride(0), **_launch(num_columns)
    )


def _launch(num_columns: int) -> dict[str, int]:
    block = min(COLUMNS, triton.next_power_of_2(num_columns))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


@triton.jit
def _exponentiate(
    logits, exponentials, numbers, scale, num_columns, stride, stride_out, stride_numbers, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, out = logits + row * stride + column, exponentials + row * stride_out + column
    per_logit = 1.0 if scale is None else tl.load(scale + row)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, num_columns, BLOCK):
        highest = tl.maximum(
            highest, tl.load(at + first, mask=column + first < num_columns, other=-float("inf"))
        )
    maximum = tl.max(highest, 0)

    total = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_columns, BLOCK):
        inside = column + first < num_columns
        z = (tl.load(at + first, mask=inside, other=-float("inf")) - maximum) * per_logit
        exponential = tl.exp(z)
        total += exponential
        product += tl.where(exponential > 0, exponential * z, 0.0)  # 0 * -inf is 0 here
        tl.store(out + first, exponential.to(exponentials.dtype.element_ty), mask=inside)
    tl.store(numbers + row, maximum * per_logit)
    tl.store(numbers + stride_numbers + row, tl.sum(total, 0))
    tl.store(numbers + 2 * stride_numbers + row, tl.sum(product, 0))


@triton.jit
def _exponentiate_at(
    logits, exponentials, offset, scale, num_columns, stride, stride_out, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, out = logits + row * stride + column, exponentials + row * stride_out + column
    per_logit = 1.0 if scale is None else tl.load(scale + row)
    shift = tl.load(offset + row)
    for first in range(0, num_columns, BLOCK):
        inside = column + first < num_columns
        z = tl.load(at + first, mask=inside, other=-float("inf")) * per_logit
        tl.store(out + first, tl.exp(z - shift).to(exponentials.dtype.element_ty), mask=inside)


@triton.jit
def _add_entropy_gradient(exponentials, factor, slope, num_columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = exponentials + row * stride + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK)
    at_one = tl.load(factor + row)
    per_log = tl.load(slope + row)
    for first in range(0, num_columns, BLOCK):
        inside = column + first < num_columns
        exponential = tl.load(at + first, mask=inside, other=0.0).to(tl.float32)
        log = tl.log(tl.where(exponential > 0, exponential, 1.0))
        gradient = (at_one + per_log * log) * exponential
        tl.store(at + first, gradient.to(exponentials.dtype.element_ty), mask=inside)
