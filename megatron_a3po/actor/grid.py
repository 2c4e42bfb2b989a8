"""The process grid: which rank stands where on the tensor, pipeline, data and expert axes.

The only file that touches Megatron-Core's `parallel_state`. Everything else receives a frozen `Grid`.
"""

import datetime
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_a3po.actor.store import gather
from megatron_a3po.config.actor import ActorSection
from megatron_a3po.errors import InputError

GRACE_S = 60.0  # what a collective waits beyond the time limit


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as this rank sees it."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Grid:
    """This rank's place: `tp` tensor, `pp` pipeline, `dp` data axis; `host_group` is gloo, for host objects.

    `ep`, the expert axis, lies within the data axis: neighbouring data ranks share the experts. An expert is split over
    the tensor axis as everything else is.
    """

    world_rank: int
    world_size: int
    device: torch.device
    tp: Axis
    pp: Axis
    dp: Axis
    ep: Axis
    host_group: dist.ProcessGroup
    patience_s: float  # how long a rank may let the others wait in a collective

    @property
    def is_main(self) -> bool:
        """Rank 0: owns the rollout process, the files and the display."""
        return self.world_rank == 0

    @property
    def holds_export(self) -> bool:
        """One rank per pipeline stage writes that stage's full tensors."""
        return self.tp.is_first and self.dp.is_first


def build_grid(
    actor: ActorSection,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    init_method: str,
    seed: int,
    timeout_s: float,
) -> Grid:
    """Join the process group and lay the grid over it. Source: parallel_state.initialize_model_parallel."""
    _check_expert_axis(actor, world_size)
    has_gpu = torch.cuda.is_available()
    # The roll call comes first, and knows names.
    timeout = datetime.timedelta(seconds=timeout_s + GRACE_S)
    if has_gpu:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        from megatron_a3po.actor.cpu import pretend_cuda_is_cpu

        pretend_cuda_is_cpu()
    gathered = gather(init_method, rank, world_size, timeout_s)
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        init_method=init_method if gathered is None else None,
        store=gathered,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=actor.tensor_model_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=actor.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=actor.expert_model_parallel_size,
        expert_tensor_parallel_size=actor.tensor_model_parallel_size,
        distributed_timeout_minutes=math.ceil((timeout_s + GRACE_S) / 60),
        create_gloo_process_groups=False,
    )
    # No layer draws random numbers (dropout is refused); sequence parallelism still asks for the tracker's states.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Grid(
        world_rank=rank,
        world_size=world_size,
        device=torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu"),
        tp=_axis(parallel_state.get_tensor_model_parallel_group()),
        pp=_axis(parallel_state.get_pipeline_model_parallel_group()),
        dp=_axis(parallel_state.get_data_parallel_group()),
        ep=_axis(parallel_state.get_expert_model_parallel_group()),
        host_group=_axis(dist.new_group(backend="gloo", timeout=timeout)).group,
        patience_s=min(10.0, timeout_s / 4),
    )


def leave_grid() -> None:
    """Take the grid and the process group down."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _check_expert_axis(actor: ActorSection, world_size: int) -> None:
    data_size = world_size // (actor.tensor_model_parallel_size * actor.pipeline_model_parallel_size)
    if data_size % actor.expert_model_parallel_size:
        raise InputError(
            f"actor.expert_model_parallel_size is {actor.expert_model_parallel_size}, but must divide the {data_size} "
            "data-parallel ranks: take a divisor, or more ranks"
        )


def _axis(group: Any) -> Axis:
    assert isinstance(group, dist.ProcessGroup)
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)
