"""The loss layer over a vocabulary split between ranks: hidden states in, loss and gradients out, no full
logits.

Read in this order:

    token_fields       what is known of each trained token, and what an objective is
    a3po_loss          all of it in one call, for trainers of other makes
    policy_objective   the objectives of a run: an anchor and the clipped loss around it
    loss               the call: one sweep or two, and log-probs alone
    one_sweep          everything in one pass, chunk by chunk: the loss on one screen
    two_sweeps         the same for objectives that look across tokens
    trained_rows       which rows are projected, and how they travel under sequence parallelism
    sweep              chunks of rows through one workspace of logits
    workspace          that buffer, kept from call to call
    projection         a chunk's logits, float32 whatever the weight, and the buffer of their exponentials
    shard_softmax      four numbers per token and shard, merged by one collective
    logits_gradient    the gradient as a factor per row and a rank-one correction
    gradients          where the hidden states' and the weight's come together
    products           the three matrix products; exponentials, triton_kernels: what lies between them
    inputs             what a call must look like; limits: what cannot be done
    chunking           how many tokens at a time
    reference          the same in plain dense torch

Needs torch and torch.distributed, no Megatron: any trainer can call it.
"""

from megatron_a3po.vocab_parallel.a3po_loss import A3POLoss, a3po_loss
from megatron_a3po.vocab_parallel.chunking import choose_chunk_tokens
from megatron_a3po.vocab_parallel.loss import LossOutput, vocab_parallel_logp, vocab_parallel_loss
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows
from megatron_a3po.vocab_parallel.workspace import Workspace

__all__ = [
    "A3POLoss",
    "LossOutput",
    "Objective",
    "TokenFields",
    "TrainedRows",
    "Workspace",
    "a3po_loss",
    "choose_chunk_tokens",
    "vocab_parallel_logp",
    "vocab_parallel_loss",
]
