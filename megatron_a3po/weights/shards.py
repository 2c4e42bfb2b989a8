"""This rank's shards from full tensors, and full tensors from every rank's shards.

Parameters come as (Megatron-Core name, tensor), layers and experts numbered over all ranks; the table says the rest.
Strict both ways: a name the table does not know, or a tensor the source does not hold, is an error.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import Table
from megatron_a3po.weights.operations import Layout, SliceReader
from megatron_a3po.weights.precision import narrowed

NamedTensors = Iterable[tuple[str, Tensor]]


@torch.no_grad()
def load_shards(
    parameters: NamedTensors, source: Mapping[str, SliceReader], table: Table, layout: Layout
) -> None:
    """Fill this rank's parameters in place. Errors: InputError names a tensor that is missing or misshapen, or that the
    parameters' precision cannot hold."""
    for name, parameter in parameters:
        made_of = table.parameter(name)
        hf_names = tuple(made_of.tensors)
        if missing := [hf_name for hf_name in hf_names if hf_name not in source]:
            raise InputError(f"the checkpoint lacks the tensor {missing[0]}, which config.json asks for")
        shard = made_of.operation.shard([source[hf_name] for hf_name in hf_names], layout)
        if shard.shape != parameter.shape:
            raise InputError(
                f"{', '.join(hf_names)} make a shard of shape {tuple(shard.shape)}, but config.json asks for "
                f"{tuple(parameter.shape)}; checkpoint and config.json belong to different models"
            )
        parameter.copy_(narrowed(", ".join(hf_names), shard, parameter.dtype))


@torch.no_grad()
def full_tensors(
    parameters: NamedTensors,
    table: Table,
    layout: Layout,
    tp_group: dist.ProcessGroup,
    ep_group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of this pipeline stage. Collective over the tensor and the expert axis.

    An expert comes from the rank that has it to all ranks of the expert axis, one at a time.
    """
    ep_size, ep_rank = (
        (1, 0) if ep_group is None else (dist.get_world_size(ep_group), dist.get_rank(ep_group))
    )
    for name, parameter in parameters:
        own = parameter.detach().contiguous()
        owners = table.on_expert_ranks(name, ep_size)
        for owner_rank, owner_name in enumerate(owners):
            shard = own
            if len(owners) > 1:
                shard = own if owner_rank == ep_rank else torch.empty_like(own)
                dist.broadcast(shard, group=ep_group, group_src=owner_rank)
            made_of = table.parameter(owner_name)
            shards = [shard]
            if layout.tp_size > 1:
                shards = [torch.empty_like(shard) for _ in range(layout.tp_size)]
                dist.all_gather(shards, shard, group=tp_group)
            yield from zip(made_of.tensors, made_of.operation.merge(shards, layout.shape), strict=True)
