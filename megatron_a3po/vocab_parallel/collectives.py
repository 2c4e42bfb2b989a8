"""The collectives of the loss layer, each the identity on one rank.

All can be started and waited for later, so that a matrix product hides them. gloo corrupts tensors that are not
contiguous without a word, so contiguity is asserted here once for all of them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None  # None: one rank


@dataclass(frozen=True)
class Pending:
    """A collective on its way. Its operands must stay untouched until `wait` has given the result."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The result; on a GPU the stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


def group_size(group: Group) -> int:
    """Number of ranks that share the vocabulary."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This rank's place among them."""
    return 0 if group is None else group.rank()


def start_all_gather(part: Tensor, group: Group) -> Pending:
    """Every rank's part, stacked: [...] -> [ranks, ...]."""
    if group_size(group) == 1:
        return Pending(part[None])
    assert part.is_contiguous()
    parts = part.new_empty(group_size(group), *part.shape)
    return Pending(parts, dist.all_gather_into_tensor(parts.flatten(0, 1), part, group=group, async_op=True))


def start_all_reduce_(summand: Tensor, group: Group) -> Pending:
    """The sum over the ranks, in place."""
    if group_size(group) == 1:
        return Pending(summand)
    assert summand.is_contiguous()
    return Pending(summand, dist.all_reduce(summand, group=group, async_op=True))


def start_reduce_scatter(summands: Tensor, group: Group) -> Pending:
    """This rank's share of the sum: [ranks, rows, ...] -> [rows, ...]."""
    if group_size(group) == 1:
        return Pending(summands[0])
    assert summands.is_contiguous()
    share = torch.empty_like(summands[0])
    work = dist.reduce_scatter_tensor(share, summands.flatten(0, 1), group=group, async_op=True)
    return Pending(share, work)
