"""Megatron-Core's optimizer and schedule, and the one question asked before they step: is everything finite?"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_a3po.config.actor import ActorSection


@dataclass(frozen=True)
class Schedule:
    """Learning rate over optimizer steps; counted in updates, not samples."""

    lr: float
    min_lr: float
    lr_warmup_iters: int
    lr_decay_style: str
    lr_decay_iters: int


class Optimizer:
    """Optimizer and schedule of one training stage (the warm start and the RL run have one each)."""

    def __init__(self, actor: ActorSection, schedule: Schedule, model: list[DistributedDataParallel]) -> None:
        self.model, self.clip_grad = model, actor.clip_grad
        config = OptimizerConfig(
            optimizer="adam",
            lr=schedule.lr,
            min_lr=schedule.min_lr,
            weight_decay=actor.weight_decay,
            adam_beta1=actor.adam_beta1,
            adam_beta2=actor.adam_beta2,
            adam_eps=actor.adam_eps,
            clip_grad=actor.clip_grad,
            bf16=actor.bf16,
            params_dtype=torch.bfloat16 if actor.bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=actor.overlap_param_gather,
        )
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            config,
            model,  # pyright: ignore[reportArgumentType]
            use_gloo_process_groups=False,
        )
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            # From 0 the first update would be a wasted batch.
            init_lr=schedule.lr / (schedule.lr_warmup_iters + 1),
            max_lr=schedule.lr,
            min_lr=schedule.min_lr,
            lr_warmup_steps=schedule.lr_warmup_iters,
            lr_decay_steps=max(schedule.lr_decay_iters, schedule.lr_warmup_iters + 1),
            lr_decay_style=schedule.lr_decay_style,
            start_wd=actor.weight_decay,
            end_wd=actor.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    @property
    def lr(self) -> float:
        """The rate the next update uses."""
        return self.megatron.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, loss: Tensor) -> tuple[bool, float]:
        """Apply the update on every rank, or on none: (applied, gradient norm).

        loss: this rank's loss sum (0 where it has none). A non-finite loss or gradient anywhere leaves weights, moments
        and schedule untouched.
        """
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        finite = torch.isfinite(loss.detach().float()) & torch.isfinite(
            torch.tensor(grad_norm, device=loss.device)
        )
        flag = finite.to(torch.float32).reshape(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        if not flag.item():
            return False, grad_norm
        # MegatronOptimizer.step from here on; called whole it would compute the norm a second time.
        if self.clip_grad > 0.0:
            for optimizer in self.distributed_optimizers:
                parameters: list[Any] = optimizer.get_parameters()
                clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm)
        self.megatron.step_with_ready_grads()
        self.scheduler.step(1)
        return True, grad_norm

    @property
    def distributed_optimizers(self) -> list[DistributedOptimizer]:
        """What Megatron-Core chained together, without the stubs of ranks that hold no shard."""
        chained = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [one for one in chained if isinstance(one, DistributedOptimizer) and not one.is_stub_optimizer]
