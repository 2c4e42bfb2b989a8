"""Runs micro-batches through Megatron-Core's pipeline schedule, with the loss layer as its loss function."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_a3po.actor.grid import Grid
from megatron_a3po.actor.model import unwrap
from megatron_a3po.actor.packing import MicroBatch
from megatron_a3po.vocab_parallel import (
    LossOutput,
    Objective,
    Workspace,
    vocab_parallel_logp,
    vocab_parallel_loss,
)
from megatron_a3po.vocab_parallel.limits import refuse_loss_scaling


@dataclass(frozen=True)
class LossSettings:
    """What the loss layer needs to know that is no tensor."""

    vocab_size: int
    temperature: float
    sequence_parallel: bool
    chunk_tokens: int


class Pipeline:
    """Forward and backward of a list of micro-batches over this rank's stages."""

    def __init__(self, model: list[DistributedDataParallel], grid: Grid, settings: LossSettings) -> None:
        self.model, self.grid, self.settings = model, grid, settings
        self.workspace = Workspace()
        config = get_model_config(model[0])
        config.finalize_model_grads_func = finalize_model_grads
        if model[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in model]
            config.no_sync_func = no_sync[0] if len(model) == 1 else no_sync
        refuse_loss_scaling(config.grad_scale_func)
        vp_size = config.virtual_pipeline_model_parallel_size
        self.schedule = get_forward_backward_func(pp_size=grid.pp.size, vp_size=vp_size)

    def train(
        self, micro_batches: list[MicroBatch], objective: Objective, entropy_coef: float = 0.0
    ) -> list[LossOutput]:
        """Forward and backward; gradients end reduced and divided by the exact denominator in the main gradients.

        Returns one output per micro-batch on the last stage, nothing elsewhere.
        """

        def loss(
            micro_batch: MicroBatch, weight: Tensor, hidden: Tensor
        ) -> tuple[Tensor, Tensor, LossOutput]:
            output = self.loss(micro_batch, weight, hidden[:, 0], objective, entropy_coef)
            denominator = torch.full((), micro_batch.denominator, dtype=torch.int, device=hidden.device)
            # The schedule may free its output tensor's data after backward; what is kept is a copy.
            return output.loss, denominator, replace(output, loss=output.loss.detach().clone())

        return self._run(micro_batches, loss, forward_only=False)

    def loss(
        self,
        micro_batch: MicroBatch,
        weight: Tensor,
        hidden: Tensor,
        objective: Objective,
        entropy_coef: float,
    ) -> LossOutput:
        """The loss layer on a micro-batch: two sweeps for an objective that looks across the tokens of a sequence.

        They are all here: packs never split a sequence.
        """
        return vocab_parallel_loss(
            hidden,
            weight,
            micro_batch.rows,
            micro_batch.fields,
            objective,
            entropy_coef=entropy_coef,
            sweeps=2 if getattr(objective, "needs_all_tokens", False) else 1,
            **self._layer_settings,
        )

    @torch.no_grad()
    def score(self, micro_batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """Log-prob and entropy [trained] of each micro-batch on the last stage, nothing elsewhere. No gradient."""

        def loss(micro_batch: MicroBatch, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            scored = vocab_parallel_logp(
                hidden[:, 0], weight, micro_batch.rows, micro_batch.fields.labels, **self._layer_settings
            )
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), scored

        return self._run(micro_batches, loss, forward_only=True)

    @property
    def _layer_settings(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "vocab_size": settings.vocab_size,
            "temperature": settings.temperature,
            "tp_group": self.grid.tp.group if self.grid.tp.size > 1 else None,
            "sequence_parallel": settings.sequence_parallel,
            "chunk_tokens": settings.chunk_tokens,
            "workspace": self.workspace,
        }

    def _run(
        self,
        micro_batches: list[MicroBatch],
        loss: Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tensor, Any]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            micro_batch: MicroBatch = next(iterator)
            hidden = chunk(micro_batch.tokens, micro_batch.position_ids, micro_batch.packed)
            return hidden, lambda output: loss(micro_batch, unwrap(chunk).output_weight, output)

        iterators = [iter(micro_batches) for _ in self.model]
        return self.schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=cast(Any, self.model if len(self.model) > 1 else self.model[0]),
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
        )
