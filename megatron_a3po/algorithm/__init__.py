"""The mathematics of A-3PO in pure torch and numpy: no Megatron, no configuration, no input or output.

Read in this order, one idea a file:

    alignment      position t scores token t+1: every token field is shifted once, by one function
    staleness      how old a token is, and how much of the behaviour policy its anchor keeps
    proximal       the trust-region anchor from log-probabilities that are already there
    policy_loss    the decoupled clipped objective, per token (A-3PO, PPO) or per sequence (GSPO)
    loss_mean      token, sequence and constant means as weights and integer denominators
    advantages     rewards of a group to advantages
    statistics     what is measured on the way, as sums, counts, minima and maxima
    metric_table   every reported metric: name, formula, healthy range

The layer that calls all this, chunk by chunk, is `megatron_a3po.vocab_parallel`.
"""

from megatron_a3po.algorithm.proximal import approximate_proximal_logp

__all__ = ["approximate_proximal_logp"]
