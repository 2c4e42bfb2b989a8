"""Distributed checkpoints of model, optimizer and schedule through Megatron-Core's dist_checkpointing.

Saved fully reshardable: another TP/PP/DP layout loads it, no flag to set before saving. What the trainer itself must
remember lies beside it and is the trainer's business (`trainer/recovery.py`).
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.model import TargetPolicy, unwrap
from megatron_a3po.actor.optimizer import Optimizer
from megatron_a3po.errors import InputError
from megatron_a3po.lifetime import be_a_servant
from megatron_a3po.weights.megatron_checkpoint import CONTENT_METADATA, describe
from megatron_a3po.weights.unpickling import reason, refuse_code

# Given to model and optimizer alike. Source: megatron.training.checkpointing._build_sharded_state_dict_metadata.
_METADATA = {
    **CONTENT_METADATA,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def save(actor: Actor, directory: Path) -> None:
    """Write this rank's shards into `directory`, which exists and is empty. Collective over all ranks."""
    for optimizer in _optimizer(actor).distributed_optimizers:
        _ensure_moments(optimizer)
    with _writer_results_from_a_fork():
        dist_checkpointing.save(
            _sharded_state(actor, is_loading=False), str(directory), content_metadata=dict(_METADATA)
        )
    if actor.grid.is_main:
        describe(directory, actor.hf_path, _layout(actor))


def load(actor: Actor, directory: Path) -> None:
    """Weights, moments and schedule from `directory`, whatever layout wrote it. Collective over all ranks.

    Errors: InputError names a file that is damaged or would run code.
    """
    refuse_code(directory)
    optimizers = _optimizer(actor).distributed_optimizers
    for optimizer in optimizers:
        _ensure_moments(optimizer)
    with _torch_adam_step_is_carried(optimizers):
        state = _loaded(_sharded_state(actor, is_loading=True), directory)
        for key, chunk in _by_key(actor.model).items():
            chunk.load_state_dict(state[key])
        _optimizer(actor).megatron.load_state_dict(state["optimizer"])
    for optimizer in optimizers:
        _give_each_parameter_its_own_step(optimizer.optimizer)
    _optimizer(actor).scheduler.load_state_dict(state["scheduler"])


def load_weights(model: Sequence[torch.nn.Module], directory: Path) -> None:
    """The stages' weights alone, of a checkpoint that may have nothing else. Collective over all ranks.

    Errors: InputError names a file that is damaged or would run code.
    """
    refuse_code(directory)
    state = _loaded(_sharded_stages(model), directory)
    for key, chunk in _by_key(model).items():
        chunk.load_state_dict(state[key])


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


def _sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    optimizer = _optimizer(actor)
    state = _sharded_stages(actor.model)
    with _buckets_counted_with_padding(optimizer):
        state["optimizer"] = optimizer.megatron.sharded_state_dict(
            state, is_loading=is_loading, metadata=dict(_METADATA)
        )
    state["scheduler"] = optimizer.scheduler.state_dict()
    return state


def _sharded_stages(model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {key: stage.sharded_state_dict(metadata=dict(_METADATA)) for key, stage in _by_key(model).items()}


def _by_key(model: Sequence[torch.nn.Module]) -> dict[str, TargetPolicy]:
    """The stages by the names that Megatron-Core gives them in a checkpoint."""
    stages = [unwrap(chunk) for chunk in model]
    return {"model": stages[0]} if len(stages) == 1 else {f"model{i}": one for i, one in enumerate(stages)}


def _layout(actor: Actor) -> dict[str, Any]:
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


@contextmanager
def _writer_results_from_a_fork() -> Iterator[None]:
    """The writer's results queue from a forked manager: a spawned one imports `__main__` again on every rank (16 s)."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=be_a_servant)
    filesystem_async._results_queue = manager.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        manager.shutdown()
