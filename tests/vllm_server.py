"""One real vLLM server for all tests of a session, launched the way a run launches it, and two models for it.

The interpreter is A3PO_VLLM_PYTHON, or that of `make install-vllm`. A server starts in 25 to 40 seconds on an idle
machine, so that every test that can shares this one: a test takes a fleet of its own to it, with its own versions.
A Qwen3 has a server of its own, in `weights/test_vllm_loads_exports.py`.
"""

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from megatron_a3po.config import read_model_shape
from megatron_a3po.rollout.engines.vllm import VllmEngine
from megatron_a3po.rollout.vllm.fleet import Fleet
from megatron_a3po.rollout.vllm.places import GivenPlace, Launch, LaunchedPlace, Place, new_token_file
from megatron_a3po.rollout.vllm.server import OnUpdate, Server, Wanted

ROOT = Path(__file__).parent.parent
VOCAB_SIZE, EOS_ID, MAX_TOKENS = 64, 1, 512
NO_VLLM = "no vLLM: `make install-vllm`, or name an interpreter that has it in A3PO_VLLM_PYTHON"
START_S = 900.0  # on a machine that does ten other things


def vllm_python() -> str | None:
    named = os.environ.get("A3PO_VLLM_PYTHON")
    installed = ROOT / ".venv-vllm/bin/python"
    return named or (str(installed) if installed.exists() else None)


# For TP 2, with heads of 32 dimensions, as vLLM on a CPU wants them.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "tie_word_embeddings": True,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
    "dtype": "float32",
}
QWEN2 = Qwen2Config(**TINY)
QWEN3 = Qwen3Config(**TINY, head_dim=32)


def write_version(folder: Path, seed: int, config: PreTrainedConfig = QWEN2) -> Path:
    """Random weights; versions differ clearly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.12) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(()))
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class VllmServer:
    url: str
    token: str
    launch: Launch
    versions: list[Path]  # directories of versions 0, 1, 2, whose weights are in no way alike

    def connect(self, url: str, on_update: OnUpdate = "recompute_kv") -> Server:
        return Server(url, token=self.token, on_update=on_update, timeout_s=120)

    @property
    def wanted(self) -> Wanted:
        return Wanted(MAX_TOKENS, read_model_shape(self.versions[0]), "float32")

    def place(self, on_update: OnUpdate = "recompute_kv", url: str | None = None) -> Place:
        return GivenPlace(url or self.url, lambda url: self.connect(url, on_update), timeout_s=60)

    @asynccontextmanager
    async def engine(
        self,
        *,
        on_update: OnUpdate = "recompute_kv",
        places: Sequence[Place] = (),
        segment_tokens: int = MAX_TOKENS,
        eos: bool = True,
        directory: Path | None = None,
        wanted: Wanted | None = None,
        timeout_s: float = START_S,
        fails: bool = False,
    ):
        """An engine whose servers have version 0, or the weights of `directory` by that name. Unless it `fails` as the
        test expects, its failure ends the test, which would wait for answers for ever."""
        test = asyncio.current_task()

        places = places or [self.place(on_update)]

        async def find() -> Sequence[Place]:
            return places

        fleet = Fleet(
            find, 0, directory or self.versions[0], wanted=wanted or self.wanted, timeout_s=timeout_s
        )
        engine = VllmEngine(
            fleet,
            eos_token_ids=[EOS_ID] if eos else [],
            seed=7,
            max_concurrent_samples=16,
            segment_tokens=segment_tokens,
            one_version=on_update == "restart",
        )

        async def watch() -> None:
            try:
                await engine.failed()
            except Exception as error:
                logging.getLogger(__name__).exception("the engine failed")
                assert test is not None
                test.cancel(f"the engine failed: {error}")

        watching = None if fails else asyncio.create_task(watch())
        try:
            yield engine
        finally:
            if watching is not None:
                watching.cancel()
            await engine.close()


def serve(root: Path, config: PreTrainedConfig = QWEN2) -> Iterator[VllmServer]:
    """A server of such a model, until the iterator goes on."""
    python = vllm_python()
    if python is None:
        pytest.skip(NO_VLLM)
    versions = [write_version(root / f"version-{seed}", seed, config) for seed in range(3)]
    token = new_token_file(root / "vllm.token")
    launch = Launch(
        python=python,
        model_dir=versions[0],
        dtype="float32",
        max_tokens=MAX_TOKENS,
        max_samples=16,
        seed=1,
        num_threads=1,
        token_file=root / "vllm.token",
        timeout_s=START_S,
        on_cpu=True,
    )
    place = LaunchedPlace(
        launch, root / "vllm.log", lambda url: Server(url, token=token, on_update="restart", timeout_s=60)
    )

    with asyncio.Runner() as runner:
        try:
            url = runner.run(place.open()).url
            yield VllmServer(url, token, launch, versions)
        finally:
            runner.run(place.close())


def read_model(directory: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
