"""Real asynchronous runs of a tiny model through the production command: trainer ranks and a rollout process."""

import json
import os
import re
import signal
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from megatron_a3po.algorithm.metric_table import TABLE
from megatron_a3po.trainer.recording import read_findings, read_metrics
from tests.trainer import command
from tests.trainer.replay import exported, identical, logs_of
from tests.trainer.task import GROUPS, STEPS, Task, num_rows

# What only a run with vLLM servers says, or with a GPU.
ELSEWHERE = ("publish/", *(() if torch.cuda.is_available() else ("memory/device_bytes",)))
# What a row says of the clock, beside time/*.
OF_THE_CLOCK = ("rollout/tokens_per_s", "rollout/idle_s", "rollout/sampled_while_training", "attempt")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("task"))


def repeatable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k not in OF_THE_CLOCK}
        for row in rows
    ]


@pytest.fixture(scope="module")
def overlapped(task: Task) -> list[dict[str, Any]]:
    """A run with room for staleness, a warm start and evaluations."""
    return task.run(
        "overlapped",
        "rollout.max_staleness=2",
        f"data.held_out={task.folder}/held_out.jsonl",
        "trainer.evaluate_every=4",
        "warm_start={steps: 3, batch_size: 16, lr_warmup_iters: 1}",
        "model.initialization=random",
    )


def test_generation_goes_on_while_the_trainer_computes(overlapped) -> None:
    assert [row["step"] for row in overlapped] == list(range(1, STEPS + 1))
    assert [row["version"] for row in overlapped] == list(range(STEPS))
    later = [row["rollout/sampled_while_training"] > 0 for row in overlapped if row["step"] > 5]
    # On a busy machine a step of this size is over before the sampler has had its turn.
    assert np.mean(later) >= 0.5


def test_every_number_of_a_row_is_in_the_table(overlapped) -> None:
    names = {name for row in overlapped for name in row} - {"step", "version", "attempt"}
    parts = {name for name in names if name.startswith("time/")} - {"time/step"}
    assert parts
    assert (names - parts) | {"time/<part>"} == {
        metric.name
        for metric in TABLE
        # What only the methods `linear` and `metrics` measure: tests/algorithm/test_statistics.py
        if metric.name in names or (metric.quantity is None and not metric.name.startswith(ELSEWHERE))
    }


def test_waiting_keeps_the_bound(overlapped, task: Task) -> None:
    assert max(row["staleness/max"] for row in overlapped) <= 2
    for row in overlapped:
        batch = task.batch("overlapped", row["step"])
        versions = np.concatenate([t.versions[t.prompt_length :] for t in batch.trajectories])
        assert versions.min() >= row["version"] - 2
        assert versions.max() <= row["version"]
        assert len(batch.groups) == GROUPS
        assert row["tokens/trained"] == len(versions)


def test_evaluations_of_the_run_and_of_its_export_agree(overlapped, task: Task) -> None:
    run_dir = task.folder / "overlapped"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy_before"] is not None
    assert any("evaluation/accuracy" in row for row in overlapped)
    ended = command.run(task.folder / "out" / "evaluate", "evaluate", str(run_dir))
    assert ended.code == 0, ended.output
    found = re.search(r"accuracy (\d\.\d+) on 8 held-out prompts", ended.output)
    assert found, ended.output
    assert float(found[1]) == pytest.approx(summary["accuracy_after"], abs=5e-4)
    warm = read_metrics(run_dir / "warm_start")
    assert [row["step"] for row in warm] == [1, 2, 3]
    assert warm[-1]["loss"] < warm[0]["loss"]
    assert not (run_dir / "weights").exists()


def test_a_bound_of_0_is_on_policy(task: Task) -> None:
    rows = task.run(
        "on-policy", "rollout.max_staleness=0", "trainer.steps=4", "actor.num_mini_batches=2", "actor.lr=1e-5"
    )
    for row in rows:
        assert row["staleness/max"] == 0
        assert row["staleness/histogram"] == {"0": row["tokens/trained"]}
        assert row["sampler_trainer/tokens"] > 0
        assert row["sampler_trainer/abs_diff/max"] < 1e-4
        assert row["ppo_actor/update/behave_imp_weight/max"] == 1.0
        # Mini-batch 2 has moved by one small update.
        assert abs(row["ppo_actor/update/importance_weight/avg"] - 1) < 5e-3


FIXED = ["rollout.fixed_staleness=2", "trainer.steps=7", "trainer.probe_every=2"]


@pytest.fixture(scope="module")
def fixed(task: Task) -> list[dict[str, Any]]:
    return task.run("fixed", *FIXED)


def test_a_fixed_staleness_is_exact(fixed, task: Task) -> None:
    for row in fixed:
        wanted = max(row["version"] - 2, 0)
        batch = task.batch("fixed", row["step"])
        for trajectory in batch.trajectories:
            assert set(trajectory.versions[trajectory.prompt_length :]) == {wanted}
        assert row["staleness/max"] == row["staleness/avg"] == row["version"] - wanted


def test_a_probe_compares_sampler_and_trainer_where_no_token_is_fresh(fixed) -> None:
    """The first step trains on its own version; from the second on a probe comes every second step."""
    probed = [row["step"] for row in fixed if "sampler_trainer/tokens" in row]
    assert probed == [1, 3, 5, 7]
    for row in fixed:
        if row["step"] in probed:
            assert row["sampler_trainer/tokens"] > 0
            assert row["sampler_trainer/abs_diff/max"] < 1e-4


def test_a_fixed_staleness_repeats_bit_for_bit(fixed, task: Task) -> None:
    """Once more, and once more with a stop in the middle: the waiting batches are part of the checkpoint."""
    again = task.run("fixed-again", *FIXED)
    assert repeatable(again) == repeatable(fixed)
    assert identical(exported(task.folder / "fixed-again"), exported(task.folder / "fixed"))

    run_dir = task.folder / "fixed-stopped"
    running = task.start("fixed-stopped", *FIXED)
    running.wait_for(lambda: num_rows(run_dir) >= 2)
    running.signal(signal.SIGUSR1)
    ended = running.wait()
    assert ended.code == 75, ended.output
    stopped_at = num_rows(run_dir)
    assert 2 <= stopped_at < 7
    resumed = task.run("fixed-stopped", *FIXED)
    assert [row["attempt"] for row in resumed] == [1] * stopped_at + [2] * (7 - stopped_at)
    assert repeatable(resumed) == repeatable(fixed)
    assert identical(exported(run_dir), exported(task.folder / "fixed"))


def test_a_stopped_run_loses_no_prompt_and_trains_none_twice(task: Task) -> None:
    """The cursor goes on: over both attempts every prompt up to the last one appears once."""
    overrides = ["rollout.max_staleness=1", "trainer.steps=6", "rollout.filter_no_signal=false"]
    run_dir = task.folder / "cursor"
    running = task.start("cursor", *overrides)
    running.wait_for(lambda: num_rows(run_dir) >= 2)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does it: the rollout process gets it too
    assert running.wait().code == 75
    rows = task.run("cursor", *overrides)
    assert [row["version"] for row in rows] == list(range(6))
    assert list(chain.from_iterable(task.trained("cursor", 6))) == list(range(6 * GROUPS))


def test_nothing_outlives_the_command(task: Task) -> None:
    run_dir = task.folder / "killed"
    running = task.start("killed", "trainer.steps=1000", "actor.tensor_model_parallel_size=2")
    running.wait_for(lambda: num_rows(run_dir) >= 1)
    found = re.search(r"pid (\d+)", (run_dir / "logs/rollout.log").read_text())
    assert found
    assert int(found[1]) in running.members()
    os.kill(running.pid, signal.SIGKILL)
    running.wait(timeout_s=60)  # which looks for what is left behind


def test_a_broken_reward_ends_the_run_with_its_own_traceback(task: Task) -> None:
    ended = task.start("broken", "reward.path=tests.trainer.rewards:broken").wait()
    assert ended.code == 3, ended.output
    assert "LookupError: no reward for" in ended.output + logs_of(task.folder / "broken")
    assert "tests/trainer/rewards.py" in ended.output + logs_of(task.folder / "broken")


def test_a_run_that_filters_every_group_says_so(task: Task) -> None:
    """It has no step to say it with; what it said stays in the run directory."""
    running = task.start("filtered", "reward.path=tests.trainer.rewards:constant", "rollout.max_staleness=1")
    running.wait_for(lambda: len(read_findings(task.folder / "filtered")) > 0)
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 75, ended.output
    assert ended.output.count("nearly every group has equal rewards") == 1
    assert num_rows(task.folder / "filtered") == 0
    assert [finding.cause for finding in read_findings(task.folder / "filtered")] == ["no signal"]


@pytest.mark.slow
def test_under_torchrun(task: Task) -> None:
    """Two ranks, each started by the launcher; a second start finds the run finished."""
    run_dir = task.folder / "torchrun"
    argv = ["train", str(task.config), f"run_dir={run_dir}", "trainer.steps=2", "rollout.max_staleness=1"]
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641")
    program += ("-m", "megatron_a3po")
    ended = command.spawn(task.folder / "out" / "torchrun", *argv, program=program).wait()
    assert ended.code == 0, ended.output
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2]
    assert "2 ranks = data 2" in ended.output
    assert exported(run_dir)
    again = command.spawn(task.folder / "out" / "torchrun", *argv, program=program).wait()
    assert again.code == 0, again.output
    assert again.output.count("done: 2 training steps") == 1


def test_a_batch_may_take_longer_than_a_collective(task: Task) -> None:
    """Two workers score the 16 responses of a batch in 8 s; the process group's limit is half of that."""
    rows = task.run(
        "slow-reward",
        "reward.path=tests.trainer.rewards:slow",
        "actor.data_parallel_size=2",
        "distributed.timeout_s=4",
        "trainer.steps=1",
    )
    assert rows[0]["time/wait_for_samples"] > 4
