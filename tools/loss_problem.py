"""A random problem for the loss layer on one shard, and who answers it: the layer, dense float64, bare products."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_a3po.vocab_parallel import TokenFields, TrainedRows, choose_chunk_tokens, vocab_parallel_loss
from megatron_a3po.vocab_parallel.policy_objective import PolicyObjective, interpolated
from megatron_a3po.vocab_parallel.products import (
    add_weight_gradient_,
    arithmetic_dtype,
    multiply_weight,
    project_,
)
from megatron_a3po.vocab_parallel.reference import reference_loss

OBJECTIVE = PolicyObjective(interpolated("loglinear"), eps_low=0.2, eps_high=0.2, dual_clip=3.0)


@dataclass(frozen=True)
class Problem:
    """Hidden states [tokens, hidden] and output embedding [vocabulary, hidden]; every row is trained."""

    hidden: Tensor
    weight: Tensor
    fields: TokenFields

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, hidden, vocabulary."""
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]


def random_problem(
    dtype: torch.dtype, *, tokens: int, hidden: int, vocab_size: int, scale: float, seed: int = 0
) -> Problem:
    """Unequal staleness, clipping on both sides; on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (tokens,), generator=generator, device=device)

    states, weight = normal(tokens, hidden).to(dtype), (scale * normal(vocab_size, hidden)).to(dtype)
    labels = integers(0, vocab_size)
    # log-prob of each label, up to noise, without [tokens, vocabulary] at once
    target = (states.float() * weight[labels].float()).sum(1)
    normaliser = torch.cat([(s.float() @ weight.float().T).logsumexp(1) for s in states.split(512)])
    behave_logp = (target - normaliser + 0.5 * normal(tokens)).clamp(max=-1e-3)
    fields = TokenFields(
        labels, behave_logp, integers(0, 9).int(), normal(tokens), torch.ones_like(behave_logp)
    )
    return Problem(states, weight, fields)


def layer_run(problem: Problem, chunk_tokens: int | None = None) -> Callable[[], dict[str, Tensor]]:
    """Forward and backward of the layer, the weight gradient straight into a float32 main gradient."""
    tokens, hidden_size, vocab_size = problem.sizes
    weight = problem.weight.detach().clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    rows = TrainedRows(torch.arange(tokens, device=weight.device), (tokens,))
    chunk = chunk_tokens or choose_chunk_tokens(hidden_size, vocab_size, weight.device)

    def run() -> dict[str, Tensor]:
        hidden = problem.hidden.detach().requires_grad_()
        hidden.grad = None
        output = vocab_parallel_loss(
            hidden,
            weight,
            rows,
            problem.fields,
            OBJECTIVE,
            vocab_size=vocab_size,
            temperature=1.0,
            tp_group=None,
            sequence_parallel=False,
            chunk_tokens=chunk,
        )
        output.loss.backward()
        assert hidden.grad is not None
        gradients = {"hidden_grad": hidden.grad, "weight_grad": weight.main_grad}  # pyright: ignore[reportAttributeAccessIssue]
        return {"loss": output.loss.detach(), "logp": output.logp, "entropy": output.entropy, **gradients}

    return run


def layer_answer(problem: Problem, chunk_tokens: int) -> dict[str, Tensor]:
    return layer_run(problem, chunk_tokens)()


def reference_answer(problem: Problem) -> dict[str, Tensor]:
    """Dense, in float64, by plain autograd."""
    hidden, weight = (
        tensor.detach().double().requires_grad_() for tensor in (problem.hidden, problem.weight)
    )
    fields = problem.fields
    vectors = {k: v for k, v in vars(fields).items() if isinstance(v, Tensor)}
    doubled = {k: v.double() for k, v in vectors.items() if v.is_floating_point()}
    fields = replace(fields, **doubled)
    trained = torch.arange(len(hidden), device=hidden.device)
    loss, logp, entropy = reference_loss(hidden, weight, trained, fields, OBJECTIVE, 1.0)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    size = OBJECTIVE(logp, fields).abs().sum()
    answer = {"loss": loss.detach(), "logp": logp, "entropy": entropy, "loss_size": size}
    return answer | {"hidden_grad": hidden.grad, "weight_grad": weight.grad}


def three_products(
    hidden: Tensor, weight: Tensor, chunk_tokens: int, total: Tensor | None = None
) -> Callable[[], None]:
    """The floor: the layer's matrix products and nothing else, in the layer's near equal chunks.

    total: the main gradient that the weight's is added to; None: it is only made, in the weight's precision.
    """
    dtype = arithmetic_dtype(weight)
    chunks = [part.to(dtype).contiguous() for part in hidden.tensor_split(-(-len(hidden) // chunk_tokens))]
    buffer = weight.new_empty(max(map(len, chunks)), len(weight), dtype=dtype)

    def run() -> None:
        for rows in chunks:
            logits = buffer[: len(rows)]
            if dtype == weight.dtype:
                torch.mm(rows, weight.T, out=logits)
            else:
                project_(logits, rows, weight)
            multiply_weight(logits, weight)
            if total is None:
                torch.mm(logits.T, rows)
            else:
                add_weight_gradient_(total, logits, rows)

    return run
