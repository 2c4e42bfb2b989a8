"""Distributed checkpoints of model, optimizer and schedule, in the format of Megatron-Core's dist_checkpointing.

Fully reshardable: another TP/PP/DP layout loads it, no flag to set before saving. Loading is Megatron-Core's. Saving
has three parts: `snapshot.py` copies this rank's state, `write` puts it into a file, `complete` says for all ranks what
is where. They may run in a thread while training goes on. What the trainer itself must remember lies beside it and is
the trainer's business (`trainer/saving.py`).
"""

import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.grid import Grid
from megatron_a3po.actor.model import TargetPolicy, unwrap
from megatron_a3po.actor.optimizer import Optimizer
from megatron_a3po.actor.snapshot import HostMemory, Snapshot, stored_names, take
from megatron_a3po.errors import InputError
from megatron_a3po.lifetime import kill_point
from megatron_a3po.weights.aside import WrittenFile
from megatron_a3po.weights.contents import Contents
from megatron_a3po.weights.megatron_checkpoint import BACKENDS, CONTENT_METADATA, describe
from megatron_a3po.weights.unpickling import COMMON_FILE, METADATA_FILE, read_metadata, reason, refuse_code

# Given to model and optimizer alike. Source: megatron.training.checkpointing._build_sharded_state_dict_metadata.
_METADATA = {
    **CONTENT_METADATA,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Written:
    """What a rank has written: its file's name and checksum, and what is where in it."""

    file: str
    checksum: str
    contents: Contents


def snapshot(actor: Actor) -> Snapshot:
    """This rank's part of a checkpoint, as long as nothing trains. Collective."""
    actor.gather_parameters()
    optimizers = _optimizer(actor).distributed_optimizers
    for optimizer in optimizers:
        _ensure_moments(optimizer)
    return take(_sharded_stages(actor.model), optimizers)


def common_state(actor: Actor) -> bytes:
    """What is no tensor of the model and the same on all ranks: groups of parameters, step and schedule."""
    optimizer = _optimizer(actor)
    states = [
        {**one.state_dict(), "param_state_sharding_type": _METADATA["distrib_optim_sharding_type"]}
        for one in optimizer.distributed_optimizers
    ]
    stream = io.BytesIO()
    torch.save(
        {
            "optimizer": states[0] if len(states) == 1 else dict(enumerate(states)),
            "scheduler": optimizer.scheduler.state_dict(),
            "content_metadata": dict(_METADATA),
        },
        stream,
    )
    return stream.getvalue()


def write(state: Snapshot, directory: Path, rank: int) -> Written:
    """Put a rank's part into a file of `directory`, onto the disk. Errors: OSError names the file."""
    contents, name = Contents(), f"__{rank}_0.distcp"
    with WrittenFile(directory / name, with_checksum=True) as file:
        for piece in state.pieces:
            contents.add(file, piece.key, piece.full_size, piece.offset, piece.tensor)
        for key, value in state.objects:
            contents.add_object(file, key, value)
        kill_point("before_fsync")
        file.sync()
        kill_point("after_fsync")
        assert file.checksum is not None
        return Written(name, file.checksum, contents)


def complete(
    directory: Path, written: Sequence[Written], common: bytes, *, template: Path, layout: dict[str, Any]
) -> dict[str, str]:
    """Rank 0, when all parts are there: say what is where. Returns the parts' checksums by file."""
    contents = Contents.of_all([one.contents for one in written])
    contents.check()
    (directory / METADATA_FILE).write_bytes(pickle.dumps(contents.metadata()))
    (directory / COMMON_FILE).write_bytes(common)
    (directory / "metadata.json").write_text(json.dumps(BACKENDS))
    describe(directory, template, layout)
    return {one.file: one.checksum for one in written}


def save(actor: Actor, directory: Path) -> None:
    """All of it at once, into `directory`, which exists and is empty. Collective over all ranks."""
    state = HostMemory().copy(snapshot(actor))
    part = write(state, directory, actor.grid.world_rank)
    parts: list[Any] = [None] * actor.grid.world_size
    dist.all_gather_object(parts, part, group=actor.grid.host_group)
    if actor.grid.is_main:
        complete(directory, parts, common_state(actor), template=actor.hf_path, layout=layout_of(actor))
    dist.barrier(group=actor.grid.host_group)


def load(actor: Actor, directory: Path) -> None:
    """Weights, moments and schedule from `directory`, whatever layout wrote it. Collective over all ranks.

    Errors: InputError names a file that is damaged or would run code, and what is missing or surplus.
    """
    refuse_code(directory)
    optimizers = _optimizer(actor).distributed_optimizers
    for optimizer in optimizers:
        _ensure_moments(optimizer)
    with _torch_adam_step_is_carried(optimizers):
        wanted = _wanted_state(actor)
        _refuse_other_names(wanted, directory, actor.grid)
        state = _loaded(wanted, directory)
        for key, chunk in _by_key(actor.model).items():
            chunk.load_state_dict(state[key])
        _optimizer(actor).megatron.load_state_dict(state["optimizer"])
    for optimizer in optimizers:
        _give_each_parameter_its_own_step(optimizer.optimizer)
    scheduler, saved = _optimizer(actor).scheduler, state["scheduler"]
    if scheduler.lr_decay_style == "constant":
        saved["lr_decay_steps"] = (
            scheduler.lr_decay_steps
        )  # without a meaning, and another if steps are added
    scheduler.load_state_dict(saved)


def load_weights(model: Sequence[torch.nn.Module], directory: Path) -> None:
    """The stages' weights alone, of a checkpoint that may have nothing else. Collective over all ranks.

    Errors: InputError names a file that is damaged or would run code.
    """
    refuse_code(directory)
    state = _loaded(_sharded_stages(model), directory)
    for key, chunk in _by_key(model).items():
        chunk.load_state_dict(state[key])


def _refuse_other_names(wanted: dict[str, Any], directory: Path, grid: Grid) -> None:
    """Errors: InputError where something is missing or surplus, over all ranks."""
    everyone: list[Any] = [None] * grid.world_size
    dist.all_gather_object(everyone, stored_names(wanted), group=grid.host_group)
    names, there = set().union(*everyone), read_metadata(directory).state_dict_metadata.keys()
    problems = [
        f"{directory} is of another model: it {verb} {min(others)} ({len(others)} such in all)"
        for verb, others in (("lacks", names - there), ("has the unknown", there - names))
        if others
    ]
    if problems:
        raise InputError(problems)


def _loaded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Of what Megatron-Core read. Errors: InputError on every rank where any could not read its part."""
    try:
        loaded: Any = dist_checkpointing.load(state, str(directory))
        return loaded
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
    except (CheckpointingException, OSError, ValueError) as error:
        failures = [error]
    raise InputError(
        f"{directory} is damaged or of another model ({reason(failures[0])}): take another checkpoint, or copy it "
        "there anew."
    )


def _wanted_state(actor: Actor) -> dict[str, Any]:
    optimizer = _optimizer(actor)
    state = _sharded_stages(actor.model)
    with _buckets_counted_with_padding(optimizer):
        state["optimizer"] = optimizer.megatron.sharded_state_dict(
            state, is_loading=True, metadata=dict(_METADATA)
        )
    state["scheduler"] = optimizer.scheduler.state_dict()
    return state


def _sharded_stages(model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {key: stage.sharded_state_dict(metadata=dict(_METADATA)) for key, stage in _by_key(model).items()}


def _by_key(model: Sequence[torch.nn.Module]) -> dict[str, TargetPolicy]:
    """The stages by the names that Megatron-Core gives them in a checkpoint."""
    stages = [unwrap(chunk) for chunk in model]
    return {"model": stages[0]} if len(stages) == 1 else {f"model{i}": one for i, one in enumerate(stages)}


def layout_of(actor: Actor) -> dict[str, Any]:
    """For which ranks a checkpoint is cut, and by what."""
    keys = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
    )
    found = {key: getattr(actor.config, key, None) for key in keys}
    return {key: value for key, value in found.items() if value} | {
        "data_parallel_size": actor.grid.dp.size,
        "megatron_core": version("megatron-core"),
    }


def _optimizer(actor: Actor) -> Optimizer:
    assert actor.optimizer is not None, "a checkpoint belongs to a training stage"
    return actor.optimizer


def _ensure_moments(optimizer: DistributedOptimizer) -> None:
    """Moments of an optimizer that has not stepped yet: zeros. Saving and loading both expect them to be there."""
    inner = optimizer.optimizer
    if inner.state:
        return
    if not isinstance(inner, torch.optim.Adam):
        optimizer._init_optimizer_states_with_dummy_values()
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[parameter] = {"step": torch.zeros(()), **moments}


@contextmanager
def _buckets_counted_with_padding(optimizer: Optimizer) -> Iterator[None]:
    """Megatron-Core gathers a buffer without the padding between its buckets, and then cuts it by offsets that count
    the padding: with several buckets (a tied embedding on a pipeline has its own, overlap_grad_reduce makes more) and
    a size that is no multiple of the padding, moments and master weights are cut from the wrong places, silently."""
    buffers = [buffer for one in optimizer.distributed_optimizers for buffer in one.buffers]
    padded = {bucket: bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets}
    padded |= {buffer: buffer.numel for buffer in buffers}
    unpadded = {one: one.numel_unpadded for one in padded}
    for one, numel in padded.items():
        one.numel_unpadded = numel
    try:
        yield
    finally:
        for one, numel in unpadded.items():
            one.numel_unpadded = numel


# Two mends for torch's Adam, which Megatron-Core uses where neither Transformer Engine nor NVIDIA Apex is installed.


@contextmanager
def _torch_adam_step_is_carried(optimizers: list[DistributedOptimizer]) -> Iterator[None]:
    """Megatron-Core copies a parameter's tensors by the keys of its state, but its source lacks Adam's `step`."""

    def carrying(optimizer: DistributedOptimizer) -> Any:
        original = optimizer._set_main_param_and_optimizer_states

        def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
            group, order = optimizer.model_param_group_index_map[model_param]
            main_param = optimizer.optimizer.param_groups[group]["params"][order]
            own = optimizer.optimizer.state[main_param]
            original(model_param, tensors if "step" not in own else {"step": own["step"], **tensors})

        return set_states

    for optimizer in optimizers:
        optimizer._set_main_param_and_optimizer_states = carrying(optimizer)
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer._set_main_param_and_optimizer_states


def _give_each_parameter_its_own_step(optimizer: torch.optim.Optimizer) -> None:
    """After loading all share one `step` tensor, which counts once per parameter: nothing fails, weights go wrong."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
