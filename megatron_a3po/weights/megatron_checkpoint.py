"""Megatron-Core's distributed checkpoints of a model's weights, written without building the model.

The format is torch's distributed checkpoint with Megatron-Core's names (`dist_checkpointing`, backend "torch_dist"):

    .metadata              every tensor's shape, its chunks, and where each lies
    __<rank>_0.distcp      that rank's chunks, each a torch.save of one tensor
    common.pt              what is no tensor; here only how the names are meant
    metadata.json          the format's name and version
    layout.json            ours: for which ranks it was cut, the Megatron-Core version
    hugging_face/          ours: config.json and the tokenizer, so that the directory is whole

The table says what there is; a shard is read from its source when its turn comes, and freed once written. torch alone
is needed, no Megatron-Core. Reading is in `megatron_reader.py`.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_a3po.errors import InputError
from megatron_a3po.weights.aside import WrittenFile, written_aside
from megatron_a3po.weights.contents import Contents
from megatron_a3po.weights.families import Parameter, Table
from megatron_a3po.weights.hugging_face import copy_configuration, say_dtype
from megatron_a3po.weights.manifest import write_manifest
from megatron_a3po.weights.operations import Layout, SliceReader, gate_up
from megatron_a3po.weights.precision import narrowed

FORMAT = 1
HUGGING_FACE = "hugging_face"
LAYOUT = "layout.json"

BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# How tensors are named and cut; Megatron-Core keeps the same with every checkpoint it writes for us.
CONTENT_METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": False}


@dataclass(frozen=True)
class Ranks:
    """For how many ranks a checkpoint is cut. Ranks count over the tensor, then the expert, then the pipeline axis."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )

    def place(self, rank: int) -> tuple[int, int, int]:
        """Its rank on the tensor, the expert and the pipeline axis."""
        rest, tp_rank = divmod(rank, self.tensor_model_parallel_size)
        pp_rank, ep_rank = divmod(rest, self.expert_model_parallel_size)
        return tp_rank, ep_rank, pp_rank


@dataclass(frozen=True)
class Placed:
    """Where a parameter lies in a checkpoint: a tensor by this name, within it at these first indices."""

    key: str
    index: tuple[int, ...]  # the expert, where the experts are stacked
    sizes: tuple[int, ...]  # of the stacking axes


def place(parameter: Parameter, table: Table) -> Placed:
    """By Megatron-Core's sharded names: layers by number, the experts of a layer stacked, norms by their fused name."""
    if parameter.expert is None or table.shape.experts is None:
        return Placed(parameter.fused_name, (), ())
    key = parameter.fused_name.replace(f".local_experts.{parameter.expert}.", ".experts.")
    return Placed(key, (parameter.expert,), (table.shape.experts.num_experts,))


def write_megatron_checkpoint(
    source: Mapping[str, SliceReader],
    table: Table,
    directory: Path,
    *,
    template: Path,
    ranks: Ranks,
    padded_vocab_size: int,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda num_elements: None,
) -> None:
    """Write the weights of `source` as ranks in this layout would save them; `directory` is there when it returns.

    dtype: of every tensor; None: as it is. advance: told of the number of elements written, shard by shard.
    Errors: InputError where the layout does not fit the model, one parameter is of several precisions or `dtype` cannot
    hold it, OutputError where a file cannot be written.
    """
    split = _Split(table, ranks, padded_vocab_size)
    if dtype is None:
        _refuse_mixed(source, table)
    with written_aside(directory) as aside:
        contents, checksums = Contents(), {}
        for rank in range(ranks.world_size):
            name = f"__{rank}_0.distcp"
            with WrittenFile(aside / name, with_checksum=True) as file:
                for parameter in split.owned_by(rank):
                    advance(_write_parameter(parameter, rank, split, source, dtype, file, contents))
                if rank == ranks.world_size - 1 and table.shape.tie_word_embeddings:
                    contents.add_object(file, _extra_state("output_layer", Placed("", (), ())), [None])
                checksums[name] = file.checksum
        (aside / ".metadata").write_bytes(pickle.dumps(contents.metadata()))
        torch.save({"content_metadata": CONTENT_METADATA}, aside / "common.pt")
        (aside / "metadata.json").write_text(json.dumps(BACKENDS))
        describe(aside, template, asdict(ranks))
        say_dtype(aside / HUGGING_FACE / "config.json", contents.sizes())
        write_manifest(aside, FORMAT, checksums)


def check_layout(table: Table, ranks: Ranks, padded_vocab_size: int) -> None:
    """Errors: InputError where the model cannot be cut so."""
    _Split(table, ranks, padded_vocab_size)


def describe(directory: Path, template: Path, layout: Mapping[str, Any]) -> None:
    """What a checkpoint of Megatron-Core does not say by itself: the model, and how it was cut."""
    (directory / HUGGING_FACE).mkdir()
    copy_configuration(template, directory / HUGGING_FACE)
    (directory / LAYOUT).write_text(json.dumps(layout, indent=1))


def _refuse_mixed(source: Mapping[str, SliceReader], table: Table) -> None:
    """What becomes one tensor has one precision, and the others would be changed silently."""
    firsts: dict[str, tuple[str, torch.dtype]] = {}
    for parameter in table.parameters:
        key = place(parameter, table).key
        for name in parameter.tensors:
            dtype = source[name][:1].dtype
            first, wanted = firsts.setdefault(key, (name, dtype))
            if dtype != wanted:
                raise InputError(
                    f"{first} is {wanted} and {name} is {dtype}, but both become part of {key}: say with --dtype which "
                    "precision it shall have."
                )


class _Split:
    """Which rank holds what. Errors: InputError where the model cannot be cut so."""

    def __init__(self, table: Table, ranks: Ranks, padded_vocab_size: int) -> None:
        self.table, self.ranks, self._padded_vocab_size = table, ranks, padded_vocab_size
        shape = table.shape
        experts = shape.experts.num_experts if shape.experts else 1
        if ranks.expert_model_parallel_size > 1 and not shape.experts:
            raise InputError(
                f"--expert-model-parallel-size is {ranks.expert_model_parallel_size}, but this "
                f"{shape.model_type} has no experts: leave it out"
            )
        heads = "attention heads" if shape.latent_attention else "key-value heads"
        for name, number, things, size in (
            ("tensor", shape.num_query_groups, heads, ranks.tensor_model_parallel_size),
            ("pipeline", shape.num_layers, "layers", ranks.pipeline_model_parallel_size),
            ("expert", experts, "experts", ranks.expert_model_parallel_size),
        ):
            if number % size:
                raise InputError(
                    f"--{name}-model-parallel-size is {size}, which does not divide the {number} {things} of the "
                    "model: take a divisor"
                )
        for parameter in table.parameters:
            self.sharded_axis(parameter)

    def owned_by(self, rank: int) -> Iterator[Parameter]:
        """What this rank writes: of replicas the first rank's."""
        tp_rank, ep_rank, pp_rank = self.ranks.place(rank)
        shape, last = self.table.shape, self.ranks.pipeline_model_parallel_size - 1
        per_stage = shape.num_layers // (last + 1)
        for parameter in self.table.parameters:
            if parameter.layer is not None:
                stage = parameter.layer // per_stage
            else:
                stage = 0 if parameter.name.startswith("embedding.") else last
            expert_rank = 0
            if parameter.expert is not None and shape.experts is not None:
                expert_rank = (
                    parameter.expert * self.ranks.expert_model_parallel_size // shape.experts.num_experts
                )
            is_first_replica = tp_rank == 0 or self.sharded_axis(parameter) is not None
            if (stage, expert_rank) == (pp_rank, ep_rank) and is_first_replica:
                yield parameter

    def layout(self, tp_rank: int, tp_size: int) -> Layout:
        return Layout(self.table.shape, self._padded_vocab_size, tp_rank, tp_size)

    def full_size(self, parameter: Parameter) -> tuple[int, ...]:
        """As Megatron-Core has it on one tensor rank."""
        return _size(parameter, self.layout(0, 1))

    def sharded_axis(self, parameter: Parameter) -> int | None:
        """Along which axis the tensor ranks split it; None: each has all of it."""
        tp_size = self.ranks.tensor_model_parallel_size
        full, shard = self.full_size(parameter), _size(parameter, self.layout(0, tp_size))
        axes = [axis for axis, (whole, part) in enumerate(zip(full, shard, strict=True)) if whole != part]
        if axes and full[axes[0]] != tp_size * shard[axes[0]]:
            raise InputError(
                f"--tensor-model-parallel-size is {tp_size}, which does not divide {', '.join(parameter.tensors)}: "
                "take a divisor"
            )
        return axes[0] if axes else None


def _size(parameter: Parameter, layout: Layout) -> tuple[int, ...]:
    sources = [torch.empty(size, device="meta") for size in parameter.tensors.values()]
    return tuple(parameter.operation.shard(sources, layout).shape)


def _write_parameter(
    parameter: Parameter,
    rank: int,
    split: _Split,
    source: Mapping[str, SliceReader],
    dtype: torch.dtype | None,
    file: WrittenFile,
    contents: Contents,
) -> int:
    """The number of elements written."""
    tp_rank, _, _ = split.ranks.place(rank)
    tp_size = split.ranks.tensor_model_parallel_size
    placed, axis = place(parameter, split.table), split.sharded_axis(parameter)
    full = (*placed.sizes, *split.full_size(parameter))
    shard = parameter.operation.shard(
        [source[name] for name in parameter.tensors], split.layout(tp_rank, tp_size)
    )
    shard = narrowed(", ".join(parameter.tensors), shard, parameter.dtype(shard.dtype, dtype))
    # Gate and up are split each by itself, so a rank has a chunk of both.
    num_parts = 2 if axis is not None and parameter.operation is gate_up else 1
    for part, chunk in enumerate(shard.chunk(num_parts)):
        offset = [*placed.index, *(0 for _ in shard.shape)]
        if axis is not None:
            offset[len(placed.index) + axis] = (part * tp_size + tp_rank) * chunk.shape[axis]
        # A view would be saved with all it is a view of.
        own = chunk if chunk.untyped_storage().nbytes() == chunk.nbytes else chunk.clone()
        contents.add(file, placed.key, full, tuple(offset), own.contiguous()[(None,) * len(placed.index)])
    module = placed.key.removesuffix(".weight")
    if tp_rank == 0 and module != placed.key and _keeps_extra_state(module):
        contents.add_object(file, _extra_state(module, placed), [None])
    return shard.numel()


def _extra_state(module: str, placed: Placed) -> str:
    """The name of a place that linear layers keep for Transformer Engine; loaders ask for it though it is empty."""
    first, number = (placed.index, placed.sizes) if placed.index else ((0,), (1,))
    return f"{module}._extra_state/shard_{'.'.join(map(str, first))}_{'.'.join(map(str, number))}"


def _keeps_extra_state(module: str) -> bool:
    name = module.rsplit(".", 1)[-1]
    return name.startswith("linear_") or name == "output_layer"
