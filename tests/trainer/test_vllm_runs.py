"""Whole runs on real vLLM servers that fail: what is trained, what is kept, and with which words a run ends."""

import asyncio
import json
import os
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_a3po.rollout.spans import name_of
from megatron_a3po.trainer.recording import read_metrics
from tests.fault_proxy import Answer, Call, FaultProxy, Forward, running
from tests.rollout.test_vllm import session_of, wait_until
from tests.trainer import workflows
from tests.trainer.command import Command
from tests.trainer.replay import logs_of
from tests.trainer.task import Task, num_rows, write_model_for_vllm
from tests.vllm_server import VllmServer

GROUPS, SAMPLES, STEPS = 2, 2, 4
COLLECTIVE = ["rollout.weight_transport=collective", "rollout.weight_bucket_bytes=50000"]
LAUNCHED = r"vLLM server: pid (\d+), port (\d+)"
ADMITTED = r"vLLM server (\S+) serves version (\d+)"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(
        tmp_path_factory.mktemp("vllm-runs"),
        write_model_for_vllm,
        rollout={
            "engine": "vllm",
            "samples_per_prompt": SAMPLES,
            "segment_tokens": 8,
            "filter_no_signal": False,
            "server_timeout_s": 30,
            "canary_every": 1,
        },
        trainer={"steps": STEPS, "prompts_per_step": GROUPS},
    )


def given(task: Task, server: VllmServer, proxy: FaultProxy) -> list[str]:
    token_file = task.folder / "token"
    token_file.write_text(server.token)
    return [f"rollout.servers=[{proxy.url}]", f"rollout.token_file={token_file}"]


def every_prompt_once(task: Task, name: str, num_steps: int) -> bool:
    return list(chain.from_iterable(task.trained(name, num_steps))) == list(range(num_steps * GROUPS))


def test_a_run_whose_servers_are_gone_writes_a_checkpoint_and_goes_on_when_they_are_back(
    task: Task, vllm_server: VllmServer
):
    """The weights come over the network all the while, the server having outlived the trainer that sent the first."""
    run_dir, proxy = task.folder / "gone", FaultProxy(vllm_server.url)
    with running(proxy) as call:
        overrides = [*given(task, vllm_server, proxy), *COLLECTIVE, "rollout.weight_staging=host"]
        first = task.start("gone", *overrides)
        first.wait_for(lambda: num_rows(run_dir) >= 1, timeout_s=600)
        (run_dir / "vllm.token").touch()  # as one is there while launched servers run
        call(proxy.cut)
        ended = first.wait(timeout_s=600)
        assert ended.code == 3, ended.output
        done = num_rows(run_dir)
        sentence = ended.output.splitlines()[-1]
        assert "no vLLM server has been there for 30 s (rollout.server_timeout_s): " in sentence
        assert f"stopped after step {done} with a checkpoint: see to the servers, and run again" in sentence
        assert proxy.url in sentence
        assert "Traceback" not in ended.output
        assert (run_dir / "checkpoints" / f"step-{done}" / "manifest.json").is_file()
        assert not (run_dir / "vllm.token").exists()

        call(proxy.open)
        again = task.start("gone", *overrides).wait(timeout_s=600)
        assert again.code == 0, again.output + logs_of(run_dir)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["attempt"] for row in rows] == [1] * done + [2] * (STEPS - done)
    assert every_prompt_once(task, "gone", STEPS)


def the_first_again(first: Path, _: Path) -> Path:
    return first


def half_of_it(first: Path, directory: Path) -> Path:
    half = first.with_name("half")
    half.mkdir()
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(dict(list(tensors.items())[: len(tensors) // 2]), half / file.name)
    return half


@pytest.mark.parametrize(("harmed", "answered"), [(the_first_again, 200), (half_of_it, 500)])
def test_a_server_that_only_says_it_took_new_weights_is_found_out(
    task: Task, vllm_server: VllmServer, harmed: Callable[[Path, Path], Path], answered: int
):
    """It takes those of the version before once more, or it fails half-way; every label it gives is the new one."""
    proxy, name, answers = FaultProxy(vllm_server.url), harmed.__name__, list[int]()
    first = task.folder / "kept" / name / "first"

    async def deceive(call: Call, forward: Forward) -> Answer:
        if call.path != "/update_weights":
            return await forward(call)
        directory = Path(json.loads(call.body)["update_info"]["source"]["directory"])
        if answers:
            directory = harmed(first, directory)
        else:
            shutil.copytree(directory, first)
        body = json.dumps({"update_info": {"source": {"directory": str(directory)}}}).encode()
        answers.append((await forward(replace(call, body=body))).status)
        if answers[-1] == 500:  # vLLM has ended this update, and would not take the label
            await forward(replace(call, path="/start_weight_update", body=b""))
        return Answer(200, b"{}")

    proxy.respond = deceive
    with running(proxy):
        ended = task.start(name, *given(task, vllm_server, proxy)).wait(timeout_s=600)
    assert ended.code == 3, ended.output
    assert f"the vLLM server {proxy.url} says that it serves version 1, but its log-probs are" in ended.output
    assert "Traceback" not in ended.output
    assert answers == [200, answered]
    asyncio.run(is_healthy(vllm_server))


async def is_healthy(server: VllmServer) -> None:
    handle = server.connect(server.url)
    try:
        await handle.check_health()
    finally:
        await handle.close()


def test_a_run_goes_on_while_one_of_its_two_servers_is_killed(
    task: Task, vllm_server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second step's episodes are half done when the server that gets work first stops, and is killed with a request
    before it. The other one does the rest of two steps alone; then both do the last ones."""
    steps, run_dir = 6, task.folder / "launched"
    monkeypatch.setenv(workflows.FOLDER, str(tmp_path))
    run = task.start(
        "launched",
        "rollout.launch=2",
        f"rollout.vllm_python={vllm_server.launch.python}",
        "rollout.server_timeout_s=900",
        "rollout.workflow=tests.trainer.workflows:held",
        f"trainer.steps={steps}",
        f"trainer.trace=[1, {steps}]",
        *COLLECTIVE,
        "rollout.weight_staging=none",
    )
    run.wait_for(lambda: num_rows(run_dir) >= 1 and len(logged(run_dir, ADMITTED)) == 2, timeout_s=900)
    assert (run_dir / "vllm.token").stat().st_mode & 0o777 == 0o600
    kill_one(run, run_dir, tmp_path)
    run.wait_for(lambda: num_rows(run_dir) >= 3 and len(logged(run_dir, ADMITTED)) == 3, timeout_s=900)
    (tmp_path / "is-back").touch()
    ended = run.wait(timeout_s=900)
    assert ended.code == 0, ended.output + logs_of(run_dir)

    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert every_prompt_once(task, "launched", steps)
    assert sum(row["rollout/lost_requests"] for row in rows) > 0
    compared = [row["sampler_trainer/abs_diff/max"] for row in rows if "sampler_trainer/tokens" in row]
    assert compared
    assert max(compared) < 1e-4
    for pid, _ in logged(run_dir, LAUNCHED):
        wait_until(lambda pid=pid: not session_of(int(pid)), "nothing of a server is left")
    assert not (run_dir / "vllm.token").exists()
    assert all((run_dir / f"logs/vllm-{number}.log").is_file() for number in range(2))
    the_timeline_is_right(task, "launched", steps)


def kill_one(run: Command, run_dir: Path, folder: Path) -> None:
    """The one that gets work first where both have none."""
    (url, _), _ = logged(run_dir, ADMITTED)
    (pid,) = (int(pid) for pid, port in logged(run_dir, LAUNCHED) if url.endswith(f":{port}"))
    members = session_of(pid)
    assert len(members) > 1
    (folder / "begin").touch()
    num_asked = len(workflows.STRUCK) * SAMPLES
    run.wait_for(lambda: len(list(folder.glob("asked-*"))) == num_asked, timeout_s=600)
    os.kill(pid, signal.SIGSTOP)
    (folder / "go-on").touch()
    # Of what it does not read, one at most asks after its health.
    run.wait_for(lambda: num_unread(int(url.rpartition(":")[2])) >= 2, timeout_s=600)
    os.kill(pid, signal.SIGKILL)


def logged(run_dir: Path, pattern: str) -> list[tuple[str, str]]:
    file = run_dir / "logs/rollout.log"
    return re.findall(pattern, file.read_text()) if file.is_file() else []


def num_unread(port: int) -> int:
    """Connections to a port of this machine with bytes that nobody has read."""
    fields = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(
        int(local.rpartition(":")[2], 16) == port and state != "0A" and int(queues.partition(":")[2], 16) > 0
        for _, local, _, state, queues, *_ in fields
    )


def the_timeline_is_right(task: Task, name: str, num_steps: int) -> None:
    """Every token that was trained is on it once, with the version it is labelled with, before the step it was trained
    in: no segment was lost after it was confirmed, or generated again. And who sampled which."""
    run_dir = task.folder / name
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    urls = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    trained = sorted(e["ts"] for e in events if e["name"] == "forward backward")
    segments = defaultdict[tuple[int, int], list[dict[str, Any]]](list)
    for event in sorted((e for e in events if e.get("cat") == "segments"), key=lambda e: e["args"]["from"]):
        segments[event["args"]["prompt"], event["args"]["sample"]].append(event)

    versions_of = defaultdict[str, list[int]](list)  # by server, of tokens trained from the second step on
    for step in range(2, num_steps + 1):  # in the first, prompt 0 is the canary's too
        for one in task.batch(name, step).trajectories:
            position = one.prompt_length
            for event in segments[one.prompt_index, one.sample]:
                assert event["args"]["from"] == position
                versions = one.versions[position : (position := position + event["args"]["tokens"])]
                assert event["name"] == name_of(versions)
                assert event["ts"] + event["dur"] <= trained[step - 1]
                versions_of[urls[event["pid"]]] += versions.tolist()
            assert position == len(one.tokens)

    (killed, _), (other, _), (newcomer, version) = logged(run_dir, ADMITTED)
    assert set(versions_of[f"vLLM {killed}"]) == {1}, "of the second step's first turns, and no other"
    assert max(versions_of[f"vLLM {other}"]) > 1
    assert min(versions_of[f"vLLM {newcomer}"]) >= int(version) >= 1
