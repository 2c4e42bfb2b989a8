"""The real rollout process, over the client: batches, publishing, evaluation, state, and every way it can end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a3po.config import Config, load_config
from megatron_a3po.errors import InputError, RewardError, RolloutError
from megatron_a3po.rollout.client import RolloutClient
from megatron_a3po.rollout.trajectory import Group, RolloutBatch

WAIT_S = 60
Starter = Callable[..., RolloutClient]


def failing_reward(prompt: str, response: str, answer: str) -> float:
    raise ZeroDivisionError("a reward in another process")


def random_reward(prompt: str, response: str, answer: str) -> float:
    return float(np.random.random())


def write_config(folder: Path, versions: list[Path], *overrides: str) -> Config:
    rows = [{"prompt": f"{a}+{a + 1}=", "answer": str(2 * a + 1)} for a in range(10, 50)]
    for name in ("train.jsonl", "held_out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
run_dir: {folder}/run
model: {{hf_path: {versions[0]}}}
data: {{train: {folder}/train.jsonl, held_out: {folder}/held_out.jsonl, max_prompt_tokens: 16}}
reward: {{type: function, path: "tests.rollout.test_process:random_reward"}}
rollout: {{samples_per_prompt: 2, max_response_tokens: 12}}
trainer: {{steps: 9, prompts_per_step: 4}}
"""
    )
    return load_config(folder / "config.yaml", overrides)


@pytest.fixture
def start(tmp_path: Path, versions: list[Path]) -> Iterator[Starter]:
    """Start a client; all are stopped at the end."""
    clients = []

    def start_one(
        *overrides: str, state: dict[str, Any] | None = None, first_version: int = 0
    ) -> RolloutClient:
        config = write_config(tmp_path, versions, *overrides)
        client = RolloutClient.start(config, tmp_path / "run", state, first_version, versions[first_version])
        clients.append(client)
        return client

    yield start_one
    for client in clients:
        client.stop()
        assert not alive(client.pid)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def train(client: RolloutClient, versions: list[Path], first: int, last: int) -> list[tuple[int, Group]]:
    consumed = []
    for version in range(first, last):
        consumed += [(version, group) for group in client.next_batch(version, WAIT_S).groups]
        client.publish(version + 1, versions[version + 1])
    return consumed


def prompt_indices(consumed: list[tuple[int, Group]]) -> list[int]:
    return [group.prompt_index for _, group in consumed]


def test_batches_publishing_evaluation_and_statistics(start: Starter, versions: list[Path], tmp_path: Path):
    client = start("rollout.max_staleness=2")
    assert client.pid != os.getpid()
    batch = client.next_batch(0, WAIT_S)
    assert isinstance(batch, RolloutBatch)
    assert [group.prompt_index for group in batch.groups] == [0, 1, 2, 3]
    assert {len(group.trajectories) for group in batch.groups} == {2}
    first = batch.groups[0].trajectories[1]
    assert first.tokens.shape == first.versions.shape == first.behave_logp.shape
    assert (first.versions[: first.prompt_length] == -1).all()
    assert (first.versions[first.prompt_length :] == 0).all()
    assert 0 < batch.statistics["reward/avg"] < 1
    counts = {f"rollout/{name}" for name in ("dropped_groups", "filtered_groups", "truncated")}
    assert counts < batch.statistics.keys()
    assert batch.statistics["rollout/tokens_per_s"] > 0

    client.publish(1, versions[1]).result(WAIT_S)
    evaluation = client.evaluate(1).result(WAIT_S)
    assert (evaluation.num_prompts, evaluation.version) == (40, 1)
    assert evaluation.min_version == evaluation.max_version == 1
    probe = client.probe(1).result(WAIT_S)
    assert set(probe.versions.tolist()) == {-1, 1}
    assert client.sampled_between(0, time.monotonic()) > 100
    assert "version 0 from" in (tmp_path / "run/logs/rollout.log").read_text()


def test_generation_goes_on_while_nobody_asks_for_a_batch(start: Starter, versions: list[Path]):
    """The trainer computes, here for ever: the next batch is generated all the same, by the weights it published."""
    client = start("rollout.max_staleness=1", "rollout.filter_no_signal=false")
    client.next_batch(0, WAIT_S)
    client.publish(1, versions[1]).result(WAIT_S)
    published = time.monotonic()
    # Four groups of two, of a token at least: those of step 2, since those of step 1 may be there already.
    assert wait_until(lambda: client.sampled_between(published, time.monotonic()) >= 8)
    client.next_batch(1, WAIT_S)
    newest = max(group.newest_version for group in client.next_batch(2, WAIT_S).groups)
    assert newest == 1


def test_publishing_waits_for_nothing_and_the_newest_wins(start: Starter, versions: list[Path]):
    client = start()
    os.kill(client.pid, signal.SIGSTOP)
    futures = [client.publish(version, versions[version]) for version in (1, 2, 3)]
    assert not any(future.done() for future in futures)
    os.kill(client.pid, signal.SIGCONT)
    for future in futures:
        future.result(WAIT_S)
    assert client.evaluate(1).result(WAIT_S).version == 3


def test_a_directory_that_is_gone_since_a_newer_is_there(
    start: Starter, versions: list[Path], tmp_path: Path
):
    client = start()
    gone = client.publish(1, tmp_path / "gone")
    client.publish(2, versions[2]).result(WAIT_S)
    gone.result(WAIT_S)
    with pytest.raises(RolloutError, match=r"(?s)Error.*nowhere"):
        client.publish(3, tmp_path / "nowhere").result(WAIT_S)


def test_a_restart_with_the_state_loses_no_prompt_and_repeats_none(start: Starter, versions: list[Path]):
    client = start("rollout.max_staleness=2")
    consumed = train(client, versions, 0, 2)
    state = client.state().result()
    client.stop()
    client = start("rollout.max_staleness=2", state=state, first_version=2)
    consumed += train(client, versions, 2, 3)
    consumed += [(3, group) for group in client.next_batch(3, WAIT_S).groups]
    assert prompt_indices(consumed) == list(range(16))
    assert max(version - group.oldest_version for version, group in consumed) <= 2


def test_a_batch_on_its_way_belongs_to_the_state(start: Starter, versions: list[Path]):
    client = start()
    with pytest.raises(TimeoutError):
        client.next_batch(0, timeout_s=0.0)
    assert client._batch is not None
    client._batch[1].result(WAIT_S)  # it has arrived, but nobody took it
    state = client.state().result()
    client.stop()
    client = start(state=state)
    assert prompt_indices(train(client, versions, 0, 2)) == list(range(8))


def test_fixed_staleness_goes_on_bitwise_after_a_restart(start: Starter, versions: list[Path]):
    fixed = ("rollout.fixed_staleness=1", "reward.path=tests.rollout.test_process:length_reward")
    straight = train(start(*fixed), versions, 0, 3)
    client = start(*fixed)
    resumed = train(client, versions, 0, 2)
    state = client.state().result()
    client.stop()
    resumed += train(start(*fixed, state=state, first_version=2), versions, 2, 3)
    for (step, group), (_, twin) in zip(straight, resumed, strict=True):
        for a, b in zip(group.trajectories, twin.trajectories, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.behave_logp, b.behave_logp)
            assert set(b.versions.tolist()) == {-1, max(step - 1, 0)}


def length_reward(prompt: str, response: str, answer: str) -> float:
    return float(len(response))


def test_a_reward_that_keeps_failing_arrives_with_its_traceback(start: Starter):
    client = start("reward.path=tests.rollout.test_process:failing_reward", "reward.max_failures=3")
    with pytest.raises(
        RewardError, match=r"(?s)3 times in a row.*in failing_reward.*a reward in another process"
    ):
        client.next_batch(0, WAIT_S)
    with pytest.raises(RewardError):
        client.state().result()


def test_bad_input_is_named_without_a_traceback(start: Starter):
    client = start("data.max_prompt_tokens=2")
    with pytest.raises(InputError, match=r"all 40 prompts are over data.max_prompt_tokens=2") as caught:
        client.next_batch(0, WAIT_S)
    assert "Traceback" not in str(caught.value)


def test_a_failure_in_the_process_arrives_with_its_traceback(
    start: Starter, versions: list[Path], tmp_path: Path
):
    client = start()
    bad = tmp_path / "version-1"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RolloutError, match=r"(?s)rollout process \(pid \d+\) failed.*Traceback.*version-1"):
        client.publish(1, bad).result(WAIT_S)


@pytest.mark.parametrize("kind", ["rollout.max_staleness=2", "rollout.fixed_staleness=2"])
def test_a_killed_process_is_started_again_where_it_was(start: Starter, versions: list[Path], kind: str):
    """Killed with batches behind it, versions published and one batch on its way: every prompt comes once."""
    client = start(kind, "rollout.filter_no_signal=false")
    consumed = train(client, versions, 0, 2)
    with pytest.raises(TimeoutError):
        client.next_batch(2, timeout_s=0.0)
    os.kill(client.pid, signal.SIGKILL)
    batch = client.next_batch(2, WAIT_S)
    assert batch.statistics["rollout/restarts"] == 1
    consumed += [(2, group) for group in batch.groups]
    client.publish(3, versions[3])
    consumed += [(3, group) for group in client.next_batch(3, WAIT_S).groups]
    assert prompt_indices(consumed) == list(range(16))
    assert max(version - group.oldest_version for version, group in consumed) <= 2
    if "fixed" in kind:
        assert [group.oldest_version for _, group in consumed[::4]] == [0, 0, 0, 1]
    state = client.state().result(WAIT_S)["producer"]
    assert not {group.prompt_index for group in state.get("finished", [])} & set(range(16))


def test_two_deaths_in_one_step_end_the_run_and_say_so(start: Starter):
    client = start()
    client.next_batch(0, WAIT_S)
    os.kill(client.pid, signal.SIGKILL)
    first = client.pid
    assert wait_until(lambda: client.pid != first)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match=r"died twice.*was ended by signal 9; the end of .*rollout.log"):
        client.evaluate(9).result(WAIT_S)


def test_signals_are_the_trainers_to_handle(start: Starter):
    client = start()
    client.next_batch(0, WAIT_S)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(client.pid, number)
    assert client.evaluate(0).result(WAIT_S).version == 0


PARENT = """
import os, sys, time
from pathlib import Path
from megatron_a3po.config import load_config
from megatron_a3po.rollout.client import RolloutClient
folder, weights, fork = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fork"
client = RolloutClient.start(load_config(folder / "config.yaml"), folder / "run", None, 0, weights)
client.next_batch(0)
if fork and os.fork() == 0:
    time.sleep(30)  # holds the connection open when its parent is gone
    os._exit(0)
print(client.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["plain", "fork"])
def test_it_ends_with_its_parent(tmp_path: Path, versions: list[Path], kind: str):
    write_config(tmp_path, versions)
    arguments = [sys.executable, "-c", PARENT, str(tmp_path), str(versions[0]), kind]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        assert wait_until(lambda: not alive(pid))
        parent.stdout.close()
