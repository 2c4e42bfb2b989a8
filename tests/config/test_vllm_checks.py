"""Which keys of vLLM servers go together, and what is said where something is missing; no vLLM needed."""

import sys
from pathlib import Path

import pytest

from megatron_a3po.config import read_model_shape, vllm_checks
from megatron_a3po.config.plan import plan_lines
from megatron_a3po.errors import ConfigError
from megatron_a3po.rollout.vllm import configured
from megatron_a3po.rollout.vllm.places import LaunchedPlace

SERVERS = "rollout.servers=['http://10.0.0.5:8000','https://node7']"


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.engine=vllm", SERVERS],
        ["rollout.engine=vllm", "rollout.servers_file=not/there/yet"],
        ["rollout.engine=vllm", SERVERS, "rollout.on_update=keep_kv", "rollout.segment_tokens=64"],
        ["rollout.engine=vllm", SERVERS, "rollout.canary_every=1", "rollout.server_timeout_s=60"],
        ["rollout.engine=vllm", SERVERS, "rollout.weight_staging=host"],
        [
            "rollout.engine=vllm",
            SERVERS,
            "rollout.weight_transport=collective",
            "rollout.weight_bucket_bytes=1000000",
        ],
    ],
    ids=" ".join,
)
def test_accepted(load, overrides: list[str]):
    load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["rollout.launch=1"], ["rollout.launch is 1", "set rollout.engine=vllm"]),
        (["rollout.on_update=restart"], ["rollout.on_update", "no servers"]),
        (["rollout.weight_transport=collective"], ["rollout.weight_transport", "no servers"]),
        (["rollout.engine=vllm", SERVERS, "rollout.weight_transport=rsync"], ["rsync", "collective"]),
        (
            ["rollout.engine=vllm", SERVERS, "rollout.weight_bucket_bytes=1000"],
            ["rollout.weight_bucket_bytes", "rollout.weight_transport=collective"],
        ),
        (["rollout.engine=vllm"], ["exactly one of", "none of them"]),
        (
            ["rollout.engine=vllm", SERVERS, "rollout.launch=1"],
            ["rollout.servers and rollout.launch is there"],
        ),
        (["rollout.engine=vllm", "rollout.servers=[]"], ["rollout.servers is empty"]),
        (["rollout.engine=vllm", "rollout.servers=['node7:8000']"], ["no URL", "node7:8000"]),
        (["rollout.engine=vllm", "rollout.servers=['http://a','http://a']"], ["names a server twice"]),
        (["rollout.engine=vllm", SERVERS, "rollout.vllm_python=python"], ["no server is launched"]),
        (["rollout.engine=vllm", SERVERS, "rollout.token_file=nowhere"], ["nowhere is not there"]),
        (
            ["rollout.engine=vllm", SERVERS, "rollout.fixed_staleness=1"],
            ["rollout.fixed_staleness", "engine=local"],
        ),
        (["rollout.engine=vllm", "rollout.launch=0"], ["rollout.launch is 0", "at least 1"]),
        (
            ["rollout.engine=vllm", "rollout.launch=1", "rollout.vllm_python=nowhere"],
            ["nowhere cannot be run"],
        ),
        (
            ["rollout.engine=vllm", "rollout.launch=1", f"rollout.vllm_python={sys.executable}"],
            ["vLLM >= 0.32"],
        ),
    ],
    ids=str,
)
def test_refused(load, overrides: list[str], fragments: list[str]):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    for fragment in fragments:
        assert fragment in str(caught.value)


def interpreter(folder: Path, version: str) -> Path:
    """A program that answers as the interpreter of an environment with this vLLM would."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\necho {version}\n")
    file.chmod(0o755)
    return file


def test_the_version_of_launched_servers(load, tmp_path: Path):
    keys = [
        "rollout.engine=vllm",
        "rollout.launch=2",
        f"rollout.vllm_python={interpreter(tmp_path, '0.31.1')}",
    ]
    with pytest.raises(ConfigError, match=r"has vLLM 0\.31\.1, which does not say which weights"):
        load(*keys)


def test_a_launched_server_has_a_gpu_of_its_own(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = ["rollout.engine=vllm", f"rollout.vllm_python={interpreter(tmp_path, '0.32.0')}"]
    keys += ["actor.tensor_model_parallel_size=2", "rollout.launch=2"]
    monkeypatch.setattr(vllm_checks, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(vllm_checks, "visible_gpus", lambda: ["0", "1", "2"])
    with pytest.raises(
        ConfigError, match="2 beside 2 ranks of the trainer, one GPU each, but this machine has 3"
    ):
        load(*keys)
    monkeypatch.setattr(vllm_checks, "visible_gpus", lambda: ["0", "1", "2", "3"])
    config = load(*keys)
    monkeypatch.setattr(configured, "visible_gpus", lambda: ["4", "5", "6", "7"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    places = configured.launched_places(config, tmp_path, 1)
    variables = [place._launch.environment() for place in places if isinstance(place, LaunchedPlace)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in variables] == ["6", "7"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(b"\n", "holds no token"), ("schlüssel".encode(), "not ASCII")],
    ids=["empty", "bytes"],
)
def test_a_token_file_without_a_token_is_refused(load, tmp_path: Path, text: bytes, sentence: str):
    (tmp_path / "token").write_bytes(text)
    with pytest.raises(
        ConfigError, match=f"rollout.token_file: .*/token (has|holds) .*{sentence.split()[-1]}"
    ):
        load("rollout.engine=vllm", SERVERS, f"rollout.token_file={tmp_path}/token")


def test_the_plan_says_where_servers_are_and_what_an_update_does(load):
    config = load("rollout.engine=vllm", SERVERS, "rollout.on_update=keep_kv")
    plan = "\n".join(plan_lines(config, read_model_shape(config.model.hf_path), 1))
    assert "engine     vLLM: http://10.0.0.5:8000, https://node7" in plan
    assert "the old weights' caches: their log-probs differ" in plan
    assert "servers stand still until they have them" in plan
