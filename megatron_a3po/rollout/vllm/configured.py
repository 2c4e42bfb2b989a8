"""The servers that a configuration names: launched here, given by URL, or registered; and what a run wants of all.

How a place opens is in `places.py`, what becomes of its server in `fleet.py`.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_a3po.config import Config, read_model_shape
from megatron_a3po.config.vllm_checks import RUN_TOKEN
from megatron_a3po.environment import visible_gpus
from megatron_a3po.rollout.vllm.places import GivenPlace, LaunchedPlace, Place, new_token_file
from megatron_a3po.rollout.vllm.recipe import launch_of
from megatron_a3po.rollout.vllm.registrations import Registrations
from megatron_a3po.rollout.vllm.server import Server, Wanted
from megatron_a3po.rollout.vllm.wire import ServerError

logger = logging.getLogger(__name__)


def wanted_of(config: Config) -> Wanted:
    return Wanted(
        config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        read_model_shape(config.model.hf_path),
        None if config.actor.bf16 else "float32",
    )


def refuse_unsuitable_servers(config: Config) -> None:
    """Of the servers given by URL, before anything is trained. One that does not answer yet is waited for later.

    Errors: ConfigError for a server that cannot serve this run.
    """

    async def look_at(url: str) -> None:
        server = connect(config, url, _given_token(config), run="", attempt=1)
        try:
            await server.check_health()
            await server.refuse_unsuitable(wanted_of(config))
        except ServerError as error:
            logger.warning("the vLLM server %s does not answer yet; it is waited for later: %s", url, error)
        finally:
            await server.close()

    async def look_at_all() -> None:
        await asyncio.gather(*(look_at(url) for url in config.rollout.servers or ()))

    asyncio.run(look_at_all())


def _given_token(config: Config) -> str | None:
    file = config.rollout.token_file
    return None if file is None else Path(file).read_text(encoding="ascii").strip()


def find_launched_or_given(
    config: Config, run_dir: Path, attempt: int
) -> Callable[[], Awaitable[Sequence[Place]]]:
    """How the fleet learns of its places: only `rollout.servers_file` may name others later."""
    rollout = config.rollout
    token = _given_token(config)
    run = name_of_run(run_dir)

    def connect_with_token(url: str) -> Server:
        return connect(config, url, token, run, attempt)

    if rollout.servers_file is not None:
        return Registrations(Path(rollout.servers_file), connect_with_token, rollout.timeout_s).find
    places: Sequence[Place] = (
        launched_places(config, run_dir, attempt)
        if rollout.launch is not None
        else [GivenPlace(url, connect_with_token, rollout.timeout_s) for url in rollout.servers or ()]
    )

    async def the_same() -> Sequence[Place]:
        return places

    return the_same


def name_of_run(run_dir: Path) -> str:
    """What servers know a run by, whatever its directory is called by now: who made its first attempt, and when."""
    first = run_dir / "attempts" / "1"
    return hashlib.sha256(first.read_bytes()).hexdigest()[:16] if first.is_file() else ""


def connect(config: Config, url: str, token: str | None, run: str, attempt: int) -> Server:
    rollout = config.rollout
    return Server(
        url,
        token=token,
        on_update=rollout.update_mode,
        timeout_s=rollout.timeout_s,
        is_staged=rollout.is_staged,
        run=run,
        attempt=attempt,
    )


def launched_places(config: Config, run_dir: Path, attempt: int) -> list[Place]:
    """The trainer's ranks have this machine's first GPUs, the servers its last, one each."""
    rollout = config.rollout
    assert rollout.launch is not None
    token_file = run_dir / RUN_TOKEN
    token = new_token_file(token_file)
    on_cpu = not torch.cuda.is_available()
    launch = launch_of(config, token_file, rollout.launch, on_cpu=on_cpu)
    gpus = [None] * rollout.launch if on_cpu else visible_gpus()[-rollout.launch :]
    run = name_of_run(run_dir)
    return [
        LaunchedPlace(
            replace(launch, gpu=gpu),
            run_dir / "logs" / f"vllm-{number}.log",
            lambda url: connect(config, url, token, run, attempt),
        )
        for number, gpu in enumerate(gpus)
    ]
