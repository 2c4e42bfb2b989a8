"""The heads `benchmark_loss` compares: from the last hidden states to the gradients of hidden states and weight.

Each is a function of a `HeadProblem` giving the work of one round, or a sentence on why it cannot run here. They
compute the same gradients where they compute the same loss; `linear_cross_entropy` is a cross-entropy, for its speed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from loss_problem import three_products
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_a3po.vocab_parallel import (
    TokenFields,
    TrainedRows,
    Workspace,
    vocab_parallel_logp,
    vocab_parallel_loss,
)
from megatron_a3po.vocab_parallel.policy_objective import PolicyObjective, interpolated

OBJECTIVE = PolicyObjective(interpolated("loglinear"), eps_low=0.2, eps_high=0.2)
Work = Callable[[], None]


@dataclass(frozen=True)
class HeadProblem:
    """One rank's share of a case."""

    hidden: Tensor  # [rows, hidden], requires gradient
    weight: Any  # [shard, hidden], requires gradient, with a main gradient
    rows: TrainedRows
    fields: TokenFields
    vocab_size: int
    chunk_tokens: int
    group: dist.ProcessGroup | None
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def all_fields(self) -> TokenFields:
        """The fields of all rows; what is not trained has loss weight 0."""
        return over_all_rows(self.fields, self.rows.local, len(self.hidden))

    def layer_settings(self) -> dict[str, Any]:
        """Of this package's layer."""
        return {
            "vocab_size": self.vocab_size,
            "temperature": 1.0,
            "tp_group": self.group,
            "sequence_parallel": False,
            "chunk_tokens": self.chunk_tokens,
            "workspace": self.workspace,
        }


def floor(problem: HeadProblem) -> Work:
    """The three products on the trained rows, added to the main gradient as Megatron-Core keeps it."""
    trained = problem.hidden.detach()[problem.rows.local]
    return three_products(trained, problem.weight.detach(), problem.chunk_tokens, problem.weight.main_grad)


def layer(problem: HeadProblem, **options: Any) -> Work:
    """This package's layer; log-probs and entropies come with the loss."""

    def work() -> None:
        output = vocab_parallel_loss(
            problem.hidden,
            problem.weight,
            problem.rows,
            problem.fields,
            OBJECTIVE,
            **problem.layer_settings(),
            **options,
        )
        output.loss.backward()

    return work


def scoring(problem: HeadProblem) -> Work:
    """Log-probs and entropies alone."""

    def work() -> None:
        vocab_parallel_logp(
            problem.hidden, problem.weight, problem.rows, problem.fields.labels, **problem.layer_settings()
        )

    return work


def over_all_rows(fields: TokenFields, trained: Tensor, num_rows: int) -> TokenFields:
    """The fields of all rows; what is not trained has loss weight 0."""
    vectors = {
        name: vector.new_zeros(num_rows).index_copy_(0, trained, vector)
        for name, vector in vars(fields).items()
        if isinstance(vector, Tensor)
    }
    return replace(fields, **vectors)


def dense_logp(hidden: Tensor, weight: Tensor, labels: Tensor, *, sequence_parallel: bool = False) -> Tensor:
    """Log-probs as Megatron-style trainers have them: logits of all rows, vocab_parallel_cross_entropy."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    enter: Any = (
        mappings.gather_from_sequence_parallel_region
        if sequence_parallel
        else mappings.copy_to_tensor_model_parallel_region
    )
    logits = enter(hidden) @ weight.T
    return -vocab_parallel_cross_entropy(logits.float()[:, None], labels[:, None])[:, 0]


def dense(problem: HeadProblem) -> Work:
    """Dense log-probs, the loss by autograd."""
    fields = problem.all_fields

    def work() -> None:
        OBJECTIVE(dense_logp(problem.hidden, problem.weight, fields.labels), fields).sum().backward()

    return work


def chunked_recompute(problem: HeadProblem) -> Work | str:
    """Log-probs of all rows chunk by chunk, each recomputed in backward."""
    if problem.group is not None:
        return "one shard only"
    fields = problem.all_fields

    def logp_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]

    def work() -> None:
        parts = zip(problem.hidden.split(problem.chunk_tokens), fields.labels.split(problem.chunk_tokens))
        found = [checkpoint(logp_of, hidden, problem.weight, y, use_reentrant=False) for hidden, y in parts]
        logp: Any = torch.cat([torch.as_tensor(part) for part in found])
        OBJECTIVE(logp, fields).sum().backward()

    return work


def torch_cross_entropy(problem: HeadProblem) -> Work | str:
    """torch's own chunked head, in this layer's chunks: a cross-entropy, no log-probs, no objective."""
    if problem.group is not None:
        return "one shard only"
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return "not in this torch"
    ignored = torch.full((len(problem.hidden),), -100, device=problem.hidden.device)
    labels = ignored.index_copy(0, problem.rows.local, problem.fields.labels)
    options = torch.nn.LinearCrossEntropyOptions(
        chunking_method=None, batch_chunk_size=min(problem.chunk_tokens, len(labels))
    )

    def work() -> None:
        torch.nn.functional.linear_cross_entropy(
            problem.hidden, problem.weight, labels, reduction="sum", options=options
        ).backward()

    return work


def liger_grpo(problem: HeadProblem, sequences: int = 4) -> Work | str:
    """liger-kernel's fused linear GRPO loss, not compiled: rows as `sequences` equal sequences, in one chunk."""
    if problem.group is not None:
        return "one shard only"
    try:
        from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearGRPOLoss,
        )
    except ImportError:
        return "liger-kernel is not installed"
    settings = {"beta": 0.0, "compiled": False, "use_ref_model": False, "loss_type": "bnpo"}
    head = LigerFusedLinearGRPOLoss(**settings, chunk_size=sequences)
    fields, shape = problem.all_fields, (sequences, len(problem.hidden) // sequences)
    behave, advantages = fields.behave_logp.view(shape), fields.advantages.view(shape)[:, 0].contiguous()
    mask = fields.loss_weights.view(shape)

    def work() -> None:
        loss, _ = head(
            problem.hidden.view(*shape, -1),
            problem.weight,
            fields.labels.view(shape),
            mask,
            advantages,
            old_per_token_logps=behave,
        )
        loss.backward()

    return work


FLOOR, LAYER = "three products", "this layer"
HEADS: dict[str, Callable[[HeadProblem], Work | str]] = {
    FLOOR: floor,
    LAYER: layer,
    "this layer, entropy term": lambda problem: layer(problem, entropy_coef=0.01),
    "this layer, two sweeps": lambda problem: layer(problem, sweeps=2),
    "this layer, log-probs only": scoring,
    "dense logits, Megatron-Core": dense,
    "chunked log-probs, recomputed": chunked_recompute,
    "torch linear_cross_entropy": torch_cross_entropy,
    "liger fused linear GRPO": liger_grpo,
}
