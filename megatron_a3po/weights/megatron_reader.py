"""Reads the weights of Megatron-Core's distributed checkpoints tensor by tensor, without building the model.

A checkpoint is what `megatron_checkpoint.py` writes, what the trainer saves (`checkpoints/step-<n>`, or the `actor/`
folder in it; optimizer states are passed over), or Megatron-LM's, with layers by number or stacked.
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_a3po.config import ModelShape, read_model_shape
from megatron_a3po.errors import InputError
from megatron_a3po.weights.families import Parameter, Table, table_of
from megatron_a3po.weights.megatron_checkpoint import HUGGING_FACE, LAYOUT, Placed, place
from megatron_a3po.weights.operations import Layout, vocabulary
from megatron_a3po.weights.precision import narrowed
from megatron_a3po.weights.safetensors_file import Announced
from megatron_a3po.weights.unpickling import METADATA_FILE, read_metadata, reason

OPTIMIZER = "optimizer."


def megatron_directory(path: Path) -> Path | None:
    """Where under `path` the distributed checkpoint is; None: it is none."""
    found = [folder for folder in (path, path / "actor") if (folder / METADATA_FILE).is_file()]
    return found[0] if found else None


class MegatronReader:
    """A checkpoint on disk. Errors: InputError names the file or tensor that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        directory = megatron_directory(path)
        if directory is None:
            raise InputError(
                f"{path} holds no .metadata file: it is no distributed checkpoint of Megatron-Core"
            )
        self.path, self.directory = path, directory
        self.metadata = read_metadata(directory)
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    @property
    def template(self) -> Path:
        """The Hugging Face configuration and tokenizer of the model."""
        return self.directory / HUGGING_FACE

    @cached_property
    def shape(self) -> ModelShape:
        return read_model_shape(self.template)

    @cached_property
    def table(self) -> Table:
        return table_of(self.shape)

    @cached_property
    def layout(self) -> dict[str, Any]:
        """For which ranks it was cut, as far as it says."""
        file = self.directory / LAYOUT
        try:
            return dict(json.loads(file.read_bytes())) if file.is_file() else {}
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{file} is no JSON object ({reason(error)}): copy it there anew, or remove it."
            ) from None

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The model's tensors by their names in the checkpoint."""
        return {key: one for key, one in self._all_tensors if not key.startswith(OPTIMIZER)}

    @cached_property
    def optimizer_tensors(self) -> dict[str, TensorStorageMetadata]:
        return {key: one for key, one in self._all_tensors if key.startswith(OPTIMIZER)}

    @property
    def _all_tensors(self) -> Iterator[tuple[str, TensorStorageMetadata]]:
        for key, one in self.metadata.state_dict_metadata.items():
            if isinstance(one, TensorStorageMetadata):
                yield key, one

    def announced(self, dtype: torch.dtype | None = None) -> list[Announced]:
        """What `hugging_face_tensors` will yield. Errors: InputError where one is missing, misshapen or left over."""
        found, used = [], set()
        for parameter in self.table.parameters:
            placed = self._placed(parameter)
            key = placed.key
            used.add(key)
            self._check_size(parameter, placed)
            stored = parameter.dtype(self.tensors[key].properties.dtype, dtype)
            found += [Announced(name, size, stored) for name, size in parameter.tensors.items()]
        if left := sorted(self.tensors.keys() - used):
            raise InputError(
                f"{self.directory} holds the tensor {left[0]}, which no {self.shape.model_type} of this shape has"
                + (f" ({len(left)} such in all)" if len(left) > 1 else "")
            )
        return found

    @torch.no_grad()
    def hugging_face_tensors(
        self, dtype: torch.dtype | None = None, advance: Callable[[int], None] = lambda num_elements: None
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor), one parameter held at a time.

        Errors: those of `read`, and InputError where `dtype` cannot hold a number.
        """
        for parameter in self.table.parameters:
            full = self.read(parameter)
            for name, tensor in zip(
                parameter.tensors, parameter.operation.merge([full], self.shape), strict=True
            ):
                yield name, narrowed(name, tensor, parameter.dtype(tensor.dtype, dtype))
                advance(tensor.numel())

    def read(self, parameter: Parameter) -> Tensor:
        """The whole parameter, as one tensor rank has it. Errors: InputError where it is damaged or misshapen."""
        placed = self._placed(parameter)
        self._check_size(parameter, placed)
        described = self.tensors[placed.key]
        start = (*placed.index, *(0 for _ in described.size[len(placed.index) :]))
        size = (*(1 for _ in placed.index), *described.size[len(placed.index) :])
        target = torch.empty(size, dtype=described.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner({placed.key: target}, self.metadata, is_coordinator=True)
        num_read = 0
        for item in _read_items(placed.key, described, start, size):
            self._read_item(item, planner)
            num_read += item.lengths.numel()
        if num_read != target.numel():
            raise InputError(
                f"{self.directory / METADATA_FILE} says where {num_read} of the {target.numel()} numbers of "
                f"{placed.key} lie: copy the checkpoint there anew."
            )
        found = target[(0,) * len(placed.index)]
        if parameter.operation is vocabulary and found[self.shape.vocab_size :].any():
            raise InputError(
                f"{self.directory} has weights in {parameter.fused_name} for {len(found)} tokens, but config.json "
                f"has vocab_size={self.shape.vocab_size}, and rows that only pad are zeros: set it to the "
                "model's own, or to all rows to keep them."
            )
        return found

    def _read_item(self, item: ReadItem, planner: DefaultLoadPlanner) -> None:
        file = self.directory / METADATA_FILE
        try:
            file = self.directory / self.metadata.storage_data[item.storage_index].relative_path
            self._reader.read_data(LoadPlan([item]), planner)
        except Exception as error:  # what a damaged pickle raises can be anything
            raise InputError(
                f"{file}: {item.storage_index.fqn} cannot be read ({reason(error)}): copy the checkpoint there anew."
            ) from None

    def _check_size(self, parameter: Parameter, placed: Placed) -> None:
        """The vocabulary may have more rows than config.json says, which pad it."""
        stored = tuple(self.tensors[placed.key].size)
        rows = self.shape.vocab_size
        if parameter.operation is vocabulary and len(stored) == 2:
            rows = max(rows, stored[0])
        meta = [torch.empty(size, device="meta") for size in parameter.tensors.values()]
        whole = parameter.operation.shard(meta, Layout(self.shape, rows, tp_rank=0, tp_size=1))
        if stored != (wanted := (*placed.sizes, *whole.shape)):
            raise InputError(
                f"{self.directory} has {placed.key} of shape {stored}, but its {HUGGING_FACE}/config.json asks for "
                f"{wanted}: bring weights and config.json of the same model."
            )

    def _placed(self, parameter: Parameter) -> Placed:
        """By number or stacked over the layers too, with the norm's fused or its plain name."""
        usual = place(parameter, self.table)
        plain = usual.key.replace(parameter.fused_name, parameter.name)
        for key in (usual.key, plain):
            if key in self.tensors:
                return Placed(key, usual.index, usual.sizes)
            stacked = key.replace(f".{parameter.layer}.", ".", 1)
            if parameter.layer is not None and stacked in self.tensors:
                return Placed(stacked, (parameter.layer, *usual.index), (self.shape.num_layers, *usual.sizes))
        raise InputError(
            f"{self.directory} lacks the tensor {usual.key}, which a {self.shape.model_type} of this shape has"
        )


def _read_items(
    key: str, described: TensorStorageMetadata, start: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[ReadItem]:
    """From every chunk what lies in the box at `start` of this `size`."""
    for chunk in described.chunks:
        low = [max(one, other) for one, other in zip(start, chunk.offsets, strict=True)]
        high = [
            min(begin + length, offset + held)
            for begin, length, offset, held in zip(start, size, chunk.offsets, chunk.sizes, strict=True)
        ]
        lengths = [end - begin for begin, end in zip(low, high, strict=True)]
        if min(lengths, default=1) > 0:
            yield ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(key),
                dest_offsets=torch.Size(here - begin for here, begin in zip(low, start, strict=True)),
                storage_index=MetadataIndex(key, chunk.offsets),
                storage_offsets=torch.Size(
                    here - offset for here, offset in zip(low, chunk.offsets, strict=True)
                ),
                lengths=torch.Size(lengths),
            )
