"""The loss layer over a vocabulary split between ranks: hidden states in, loss and gradients out, no full
logits.

Read in this order:

    token_fields       what is known of each trained token, and what an objective is
    policy_objective   the objectives of a run: an anchor and the clipped loss around it
    loss               the one sweep that does everything, and the log-prob-only call
    shard_softmax      four numbers per token and shard, merged by one collective
    trained_rows       which rows are projected, with and without sequence parallelism
    products           the three matrix products
    chunking           how many tokens at a time
    reference          the same in plain dense torch

Needs torch and torch.distributed, no Megatron: any trainer can call it.
"""

from megatron_a3po.vocab_parallel.chunking import choose_chunk_tokens
from megatron_a3po.vocab_parallel.loss import LossOutput, vocab_parallel_logp, vocab_parallel_loss
from megatron_a3po.vocab_parallel.token_fields import Objective, TokenFields
from megatron_a3po.vocab_parallel.trained_rows import TrainedRows

__all__ = [
    "LossOutput",
    "Objective",
    "TokenFields",
    "TrainedRows",
    "choose_chunk_tokens",
    "vocab_parallel_logp",
    "vocab_parallel_loss",
]
