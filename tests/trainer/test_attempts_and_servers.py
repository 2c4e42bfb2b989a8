"""vLLM servers that outlive a trainer: the next attempt gives them its own weights before it asks them for anything.

The one real server of the session, given by its URL, so that it stays when a run ends. The reward draws random numbers:
two attempts make different weights of the same version. At a bound of 0 every trained token is compared with the
trainer's own weights, which are this attempt's.
"""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_a3po.trainer.recording import read_metrics
from tests.rollout.tiny import tiny_tokenizer
from tests.run_files import write_rows
from tests.trainer import command
from tests.trainer.replay import logs_of
from tests.trainer.test_asynchronous import num_rows
from tests.trainer.test_kills import newest_checkpoint
from tests.vllm_server import VllmServer, write_version

SAVE_EVERY = 4


def write_task(folder: Path, server: VllmServer) -> Path:
    write_version(folder / "model", 0)
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(
        folder / "train.jsonl", [{"prompt": f"{i}+{j}=", "answer": "1"} for i in range(9) for j in range(9)]
    )
    (folder / "token").write_text(server.token)
    (folder / "token").chmod(0o600)
    config: dict[str, Any] = {
        "model": {"hf_path": f"{folder}/model"},
        "data": {"train": f"{folder}/train.jsonl", "max_prompt_tokens": 16},
        "reward": {"type": "function", "path": "tests.rollout.test_process:random_reward"},
        "actor": {"prox_logp_method": "loglinear", "lr": 1e-3, "max_tokens_per_micro_batch": 512},
        "rollout": {
            "engine": "vllm",
            "servers": [server.url],
            "token_file": f"{folder}/token",
            "samples_per_prompt": 4,
            "max_response_tokens": 24,
            "max_staleness": 0,
        },
        "trainer": {"steps": 1000, "prompts_per_step": 4, "save_every": SAVE_EVERY},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(config))
    return folder / "task.yaml"


async def label(server: VllmServer) -> str:
    handle = server.connect(server.url)
    try:
        return await handle.label()
    finally:
        await handle.close()


def test_no_token_of_an_abandoned_attempt_is_trained(vllm_server: VllmServer, tmp_path: Path) -> None:
    config, run_dir = write_task(tmp_path, vllm_server), tmp_path / "run"
    argv = ["train", str(config), f"run_dir={run_dir}"]
    first = command.fork(tmp_path / "out", *argv)
    first.wait_for(lambda: num_rows(run_dir) == newest_checkpoint(run_dir) + 3 > 3, timeout_s=400)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # The server has versions of attempt 1 that are beyond the checkpoint.
    checkpoint, num_before = newest_checkpoint(run_dir), num_rows(run_dir)
    assert num_before > checkpoint

    again = command.fork(tmp_path / "out", *argv)
    again.wait_for(lambda: num_rows(run_dir) >= num_before + 2, timeout_s=400)

    assert asyncio.run(label(vllm_server)).startswith("2.")
    again.signal(signal.SIGTERM)
    ended = again.wait(timeout_s=300)
    assert ended.code == 75, ended.output + logs_of(run_dir)
    rows = [row for row in read_metrics(run_dir) if row["attempt"] == 2]
    assert rows[0]["step"] == checkpoint + 1
    for row in rows:
        assert row["staleness/max"] == 0
        assert row["sampler_trainer/tokens"] == row["tokens/trained"]
        assert row["sampler_trainer/abs_diff/max"] == pytest.approx(0, abs=2e-3), row
