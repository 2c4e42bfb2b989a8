"""vLLM servers that outlive a trainer: the next attempt gives them its own weights before it asks them for anything.

The one real server of the session, given by its URL, so that it stays when a run ends. The reward draws random numbers:
two attempts make different weights of the same version. At a bound of 0 every trained token is compared with the
trainer's own weights, which are this attempt's.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from megatron_a3po.trainer.recording import read_metrics
from tests.trainer.replay import logs_of
from tests.trainer.task import Task, num_rows, write_model_for_vllm
from tests.trainer.test_kills import newest_checkpoint
from tests.vllm_server import VllmServer

SAVE_EVERY = 4


async def label(server: VllmServer) -> str:
    handle = server.connect(server.url)
    try:
        return await handle.label()
    finally:
        await handle.close()


def test_no_token_of_an_abandoned_attempt_is_trained(vllm_server: VllmServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(vllm_server.token)
    task = Task(
        tmp_path,
        write_model_for_vllm,
        reward={"path": "tests.rollout.test_process:random_reward"},
        rollout={
            "engine": "vllm",
            "servers": [vllm_server.url],
            "token_file": f"{tmp_path}/token",
            "max_staleness": 0,
        },
        trainer={"steps": 1000, "save_every": SAVE_EVERY},
    )
    run_dir = tmp_path / "run"
    first = task.start("run")
    first.wait_for(lambda: num_rows(run_dir) == newest_checkpoint(run_dir) + 3 > 3, timeout_s=400)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # The server has versions of attempt 1 that are beyond the checkpoint.
    checkpoint, num_before = newest_checkpoint(run_dir), num_rows(run_dir)
    assert num_before > checkpoint

    again = task.start("run")
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
