"""The collectives of the loss layer, each the identity on one rank.

gloo corrupts tensors that are not contiguous without a word, so contiguity is asserted here once for all of
them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a3po.algorithm.statistics import Statistics

Group = dist.ProcessGroup | None  # None: one rank


def group_size(group: Group) -> int:
    """Number of ranks that share the vocabulary."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This rank's place among them."""
    return 0 if group is None else group.rank()


def all_gather(part: Tensor, group: Group) -> Tensor:
    """Every rank's part, stacked: [...] -> [ranks, ...]."""
    if group_size(group) == 1:
        return part[None]
    assert part.is_contiguous()
    parts = part.new_empty(group_size(group) * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(parts, part, group=group)
    return parts.view(group_size(group), *part.shape)


def all_reduce_(summand: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, in place."""
    if group_size(group) > 1:
        assert summand.is_contiguous()
        dist.all_reduce(summand, group=group)
    return summand


def reduce_scatter(summands: Tensor, group: Group) -> Tensor:
    """This rank's share of the sum: [ranks, rows, ...] -> [rows, ...]."""
    if group_size(group) == 1:
        return summands[0]
    assert summands.is_contiguous()
    share = torch.empty_like(summands[0])
    dist.reduce_scatter_tensor(share, summands.flatten(0, 1), group=group)
    return share


def merge_over_ranks(statistics: Statistics, names: tuple[str, ...], group: Group) -> Statistics:
    """The whole step's statistics on every rank of the group: one all-gather, merged locally.

    `names` is the same on all ranks. A rank without values (an earlier pipeline stage) passes an empty
    `Statistics`; tensor-parallel ranks all hold the same values, so all but one of them must pass an empty
    one too.
    """
    return Statistics.merged(names, all_gather(statistics.aligned(names).table, group))
