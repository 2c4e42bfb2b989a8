"""How much memory a piece of work holds at most beyond what there was before, as torch's allocator counts it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: torch.device | None = None) -> int:
    """The largest sum of allocations during `work`; on a CPU exact, and slow: not while timing."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = highest = 0
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            highest = max(highest, held)
    return highest
