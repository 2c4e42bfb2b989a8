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

from megatron_a3po.rollout.vllm.configured import name_of_run
from megatron_a3po.rollout.vllm.server import Server
from megatron_a3po.trainer.recording import read_metrics
from tests.trainer.held import hold_before
from tests.trainer.replay import logs_of
from tests.trainer.task import Task, num_rows, write_model_for_vllm
from tests.trainer.test_kills import newest_checkpoint
from tests.vllm_server import VllmServer

SAVE_EVERY = 4


async def label(server: VllmServer, run: str = "", attempt: int = 1) -> str:
    """What it calls its weights; asked as an attempt at a run, where that is given."""
    handle = Server(
        server.url, token=server.token, on_update="recompute_kv", timeout_s=120, run=run, attempt=attempt
    )
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
    first = task.start("run", before=hold_before(SAVE_EVERY + 4))
    first.wait_for(lambda: num_rows(run_dir) == newest_checkpoint(run_dir) + 3 == SAVE_EVERY + 3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # The server has versions of attempt 1 that are beyond the checkpoint.
    checkpoint, num_before = newest_checkpoint(run_dir), num_rows(run_dir)

    again = task.start("run")
    again.wait_for(lambda: num_rows(run_dir) >= num_before + 2)

    # A third attempt asks, on a disk that the second does not see.
    assert asyncio.run(label(vllm_server, name_of_run(run_dir), 3)).startswith("2.")
    ended = again.wait()
    assert ended.code == 3, ended.output + logs_of(run_dir)
    assert (
        f"attempt 2 is fenced off: the vLLM server {vllm_server.url} takes orders of attempt 3"
        in ended.output
    )
    assert "Traceback" not in ended.output
    rows = [row for row in read_metrics(run_dir) if row["attempt"] == 2]
    assert rows[0]["step"] == checkpoint + 1
    for row in rows:
        assert row["staleness/max"] == 0
        assert row["sampler_trainer/tokens"] == row["tokens/trained"]
        assert row["sampler_trainer/abs_diff/max"] == pytest.approx(0, abs=2e-3), row
