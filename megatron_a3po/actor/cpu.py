"""Megatron-Core without a GPU.

Megatron-Core names `cuda` devices and streams throughout. `pretend_cuda_is_cpu()` makes those names mean the CPU, so
that the same actor runs on gloo on a laptop and in tests. It is called once per process, before any model is built, and
only where torch sees no GPU; nothing else in the project knows about it. What it replaces is in `_PATCHES` below.
"""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _means_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaDeviceIsCpu(TorchFunctionMode):
    """Every `device="cuda"` of a factory call or of `Tensor.to` becomes the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and _means_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


class _Stream:
    """Stands for `torch.cuda.Stream`, and for the events it records: a class, because third parties subclass it and
    test instances of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self


def _type_name(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    # DistributedOptimizer tells fp32 from half parameters by the names of CUDA tensor types.
    name = _tensor_type(tensor, dtype, **kwargs) if dtype is not None else _tensor_type(tensor)
    # Under the mode the lookup by name comes back here once more, with the name already made.
    plain = isinstance(name, str) and not name.startswith("torch.cuda.")
    return name.replace("torch.", "torch.cuda.", 1) if plain else name


def _host_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_tensor_type = torch.Tensor.type
_no_op = lambda *args, **kwargs: None  # noqa: E731

_PATCHES: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "current_device": lambda: _CPU,
        "set_device": _no_op,
        "synchronize": _no_op,
        "empty_cache": _no_op,
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    },
    torch.Tensor: {"cuda": lambda tensor, *args, **kwargs: tensor, "type": _type_name},
}

_mode: _CudaDeviceIsCpu | None = None


def pretend_cuda_is_cpu() -> None:
    """Make Megatron-Core's `cuda` names mean the CPU for the rest of this process. Does nothing the second time."""
    global _mode
    if _mode is not None:
        return
    for owner, replacements in _PATCHES.items():
        for name, replacement in replacements.items():
            setattr(owner, name, replacement)

    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import token_dispatcher

    # The dispatcher of tokens to experts makes host numbers of its split sizes only where they are on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _host_numbers

    # Megatron-Core's tracker reaches below torch.cuda for its generator.
    tensor_parallel_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    tensor_parallel_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        torch.set_rng_state(new_state)
    )
    # The compiler stumbles over functions replaced here, and would take minutes for what runs once.
    torch.compiler.set_stance("force_eager")
    _mode = _CudaDeviceIsCpu()
    _mode.__enter__()
