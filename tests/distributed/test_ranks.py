"""The helper that starts ranks: results in order, every rank's traceback, no process left."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RanksFailed, run_ranks


def add_up(rank: int, world_size: int, factor: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(rank * factor)])
    dist.all_reduce(total)
    return rank, total


def test_every_rank_returns_its_result_in_order():
    results = run_ranks(add_up, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.item() == 30.0 for _, total in results)


def test_ranks_fork_after_a_backward_in_the_parent():
    torch.ones(3, requires_grad=True).sum().backward()

    def differentiate(rank: int, world_size: int) -> float:
        x = torch.ones(3, requires_grad=True)
        (x * rank).sum().backward()
        assert x.grad is not None
        return x.grad.sum().item()

    assert run_ranks(differentiate, 2) == [0.0, 3.0]


def test_a_failure_shows_every_ranks_story_and_ends_the_waiting():
    def fail_on_one(rank: int, world_size: int) -> None:
        if rank == 1:
            raise ValueError("the cause")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RanksFailed) as error:
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - started < 20
    message = str(error.value)
    assert "rank 1" in message
    assert "ValueError: the cause" in message
    assert "rank 0: not done" in message
    assert "in fail_on_one" in message.split("rank 1")[0]
    assert not multiprocessing.active_children()


def test_a_rank_that_dies_is_named_with_its_exit_code():
    def die(rank: int, world_size: int) -> None:
        if rank == 0:
            os._exit(7)

    with pytest.raises(RanksFailed, match="rank 0: died without a word, exit code 7"):
        run_ranks(die, 2, timeout_s=10)


def test_a_rank_that_hangs_is_ended_at_the_time_limit():
    def hang(rank: int, world_size: int) -> None:
        if rank == 1:
            time.sleep(60)

    with pytest.raises(RanksFailed, match=r"rank 1: not done; it was here"):
        run_ranks(hang, 2, timeout_s=2)
