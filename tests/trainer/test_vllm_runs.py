"""Whole runs on real vLLM servers that fail: what is trained, what is kept, and with which words a run ends."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_a3po.trainer.batch import batch_path, load_batch
from megatron_a3po.trainer.recording import read_metrics
from tests.fault_proxy import Answer, Call, FaultProxy, Forward, running
from tests.rollout.test_vllm import session_of, wait_until
from tests.rollout.tiny import tiny_tokenizer
from tests.run_files import write_rows
from tests.trainer import command
from tests.trainer.replay import logs_of
from tests.vllm_server import VllmServer, write_version

GROUPS, STEPS = 2, 4


class Runs:
    """A model and sums to do; each run is the production command, with generation on vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_version(folder / "model", seed=0)
        tiny_tokenizer().save_pretrained(folder / "model")
        sums = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(9) for j in range(9)]
        write_rows(folder / "train.jsonl", sums)
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(self._sections()))

    def _sections(self) -> dict[str, Any]:
        return {
            "model": {"hf_path": f"{self.folder}/model"},
            "data": {"train": f"{self.folder}/train.jsonl", "max_prompt_tokens": 16},
            "reward": {"type": "function", "path": "tests.trainer.rewards:any_response"},
            "actor": {"prox_logp_method": "loglinear", "lr": 1e-3, "max_tokens_per_micro_batch": 512},
            "rollout": {
                "engine": "vllm",
                "samples_per_prompt": 2,
                "max_response_tokens": 24,
                "segment_tokens": 8,
                "filter_no_signal": False,
                "server_timeout_s": 30,
                "canary_every": 1,
            },
            "trainer": {"steps": STEPS, "prompts_per_step": GROUPS, "dump_batches": True},
        }

    def start(self, name: str, *overrides: str) -> command.Command:
        argv = ["train", str(self.config), f"run_dir={self.folder / name}", *overrides]
        return command.fork(self.folder / "out" / name, *argv)

    def trained(self, name: str, num_steps: int) -> list[int]:
        """The prompts of all batches, in the order of training."""
        batches = [load_batch(batch_path(self.folder / name / "batches", n + 1)) for n in range(num_steps)]
        return [group.prompt_index for batch in batches for group in batch.groups]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("vllm-runs"))


def num_rows(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def given(runs: Runs, server: VllmServer, proxy: FaultProxy) -> list[str]:
    token_file = runs.folder / "token"
    token_file.write_text(server.token)
    return [f"rollout.servers=[{proxy.url}]", f"rollout.token_file={token_file}"]


def test_a_run_whose_servers_are_gone_writes_a_checkpoint_and_goes_on_when_they_are_back(
    runs: Runs, vllm_server: VllmServer
):
    run_dir, proxy = runs.folder / "gone", FaultProxy(vllm_server.url)
    with running(proxy) as call:
        overrides = given(runs, vllm_server, proxy)
        first = runs.start("gone", *overrides)
        first.wait_for(lambda: num_rows(run_dir) >= 1, timeout_s=600)
        (run_dir / "vllm.token").touch()  # as one is there while launched servers run
        call(proxy.cut)
        ended = first.wait(timeout_s=600)
        assert ended.code == 3, ended.output
        done = num_rows(run_dir)
        sentence = ended.output.splitlines()[-1]
        assert (
            "no vLLM server has been there for 30 s (rollout.server_timeout_s): "
            in sentence
        )
        assert f"stopped after step {done} with a checkpoint: see to the servers, and run again" in sentence
        assert proxy.url in sentence
        assert "Traceback" not in ended.output
        assert (run_dir / "checkpoints" / f"step-{done}" / "manifest.json").is_file()
        assert not (run_dir / "vllm.token").exists()

        call(proxy.open)
        again = runs.start("gone", *overrides).wait(timeout_s=600)
        assert again.code == 0, again.output + logs_of(run_dir)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["attempt"] for row in rows] == [1] * done + [2] * (STEPS - done)
    assert runs.trained("gone", STEPS) == list(range(STEPS * GROUPS)), "none lost, none twice"


def test_a_server_that_only_says_it_took_new_weights_is_found_out(runs: Runs, vllm_server: VllmServer):
    """It takes those of the version before again; every label it gives is the new one."""
    proxy, taken = FaultProxy(vllm_server.url), []

    async def keeps_the_first(call: Call, forward: Forward) -> Answer:
        if call.path == "/update_weights":
            taken.append(call.body)
            first = Path(json.loads(taken[0])["update_info"]["source"]["directory"])
            kept = runs.folder / "kept"
            if not kept.exists():
                kept.mkdir()
                for file in first.iterdir():
                    (kept / file.name).write_bytes(file.read_bytes())
            body = json.dumps({"update_info": {"source": {"directory": str(kept)}}}).encode()
            return await forward(replace(call, body=body))
        return await forward(call)

    proxy.respond = keeps_the_first
    with running(proxy):
        ended = runs.start("deceived", *given(runs, vllm_server, proxy)).wait(timeout_s=600)
    assert ended.code == 3, ended.output
    assert f"the vLLM server {proxy.url} says that it serves version 1, but its log-probs are" in ended.output
    assert "Traceback" not in ended.output
    assert len(taken) == 2


@pytest.mark.slow
def test_a_run_goes_on_while_one_of_its_two_servers_is_killed(runs: Runs, vllm_server: VllmServer):
    """And once more: both are launched again by the next start, from where the run had stopped."""
    run_dir = runs.folder / "launched"
    steps = 40
    overrides = [
        "rollout.launch=2",
        f"rollout.vllm_python={vllm_server.launch.python}",
        "rollout.server_timeout_s=900",
        f"trainer.steps={steps}",
    ]
    run = runs.start("launched", *overrides)
    logs = [run_dir / "logs" / f"vllm-{number}.log" for number in range(2)]

    def launched() -> list[int]:
        text = (run_dir / "logs/rollout.log").read_text() if (run_dir / "logs/rollout.log").is_file() else ""
        return [
            int(line.partition("pid ")[2].split(",")[0])
            for line in text.splitlines()
            if "vLLM server: pid" in line
        ]

    def admissions() -> int:
        return (run_dir / "logs/rollout.log").read_text().count("serves version")

    run.wait_for(lambda: num_rows(run_dir) >= 2 and admissions() == 2, timeout_s=900)
    assert (run_dir / "vllm.token").stat().st_mode & 0o777 == 0o600
    servers = launched()
    os.kill(servers[0], signal.SIGKILL)
    run.wait_for(lambda: admissions() == 3, timeout_s=900)
    ended = run.wait(timeout_s=900)
    assert ended.code == 0, ended.output + logs_of(run_dir)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert runs.trained("launched", steps) == list(range(steps * GROUPS)), "none lost, none twice"
    assert sum(row["rollout/lost_requests"] for row in rows) > 0
    assert all(row["sampler_trainer/abs_diff/max"] < 1e-3 for row in rows if "sampler_trainer/tokens" in row)
    assert len(launched()) == 3
    for server in launched():
        wait_until(lambda server=server: not session_of(server), "nothing of a server is left")
    assert not (run_dir / "vllm.token").exists()
    assert all(log.is_file() for log in logs)
