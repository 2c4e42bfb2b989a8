"""Weights in another precision: rounded to the nearest number, and never to an infinity."""

import torch
from torch import Tensor

from megatron_a3po.errors import InputError


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; infinities and NaNs that it has stay. name: of the Hugging Face tensor it is, or is made of.

    Errors: InputError where a finite number would become an infinity.
    """
    found = tensor.to(dtype)
    # The extremes tell, in one pass and without a mask as large as the tensor.
    if dtype == tensor.dtype or all(extreme.isfinite() for extreme in found.aminmax()):
        return found
    lost = tensor[found.isinf() & tensor.isfinite()]
    if not lost.numel():
        return found
    largest, kind = float(lost.abs().max()), str(dtype).removeprefix("torch.")
    mend = (
        "take bfloat16, or leave the precision as it is."
        if dtype == torch.float16
        else "no model has such a weight, copy or download it again."
    )
    raise InputError(
        f"{name}: the largest number is {largest:.3g}, but {kind} ends at {torch.finfo(dtype).max:.3g}: {mend}"
    )
