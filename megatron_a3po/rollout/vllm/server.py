"""One vLLM server over HTTP: a segment generated, new weights taken, what it says of itself. `fleet.py` has them all.

Every failure is a ServerError, whatever its kind: who asked goes elsewhere, and the fleet looks after the server. Only
what a person must mend is a ConfigError, and a FencedError that a later attempt has the server.
"""

import asyncio
import json
import logging
import math
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import numpy as np

from megatron_a3po.config import ModelShape, read_model_shape
from megatron_a3po.errors import ConfigError, FencedError, RolloutError
from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.vllm.wire import (
    BACKEND,
    GENERATE,
    NEWEST_ATTEMPT,
    STAGING,
    Missing,
    Rejected,
    Segment,
    ServerError,
    TimedOut,
    Unreachable,
    attempt_header,
    generate_body,
    label_of,
    read_segment,
    read_vocabulary,
    update_body,
    vocabulary_body,
)

logger = logging.getLogger(__name__)

OnUpdate = Literal["recompute_kv", "keep_kv", "restart"]
OLDEST = (0, 32)
QUICK_S = 30.0  # a healthy server on a busy machine takes seconds
CONNECTION_ATTEMPTS = 2
STAGING_POLL_S, STAGING_POLL_SHARE = 0.01, 0.02  # at least, and of the time it has taken
STEERED_S = 120.0  # for what is done between two steps of generation
KINDS = {400: Rejected, 413: Rejected, 422: Rejected, 404: Missing, 405: Missing}
# vLLM ends a connection on which it answered an error, maybe while the next request is on its way.
LAST_ON_IT = {"Connection": "close"}
SIZES = (
    "model_type",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
)

# How a server takes an update: what becomes of its requests under way, and of the caches of their prefixes.
PAUSES: dict[OnUpdate, dict[str, str]] = {
    "recompute_kv": {"mode": "keep", "clear_cache": "true"},
    "keep_kv": {"mode": "keep", "clear_cache": "false"},
    "restart": {"mode": "abort", "clear_cache": "true"},
}


@dataclass(frozen=True)
class Wanted:
    """What a run wants of every server."""

    max_tokens: int
    shape: ModelShape
    dtype: str | None = None  # None: whichever it computes in


class Server:
    """A handle; whether it gets work is the fleet's decision. `version` is None until weights of ours are in it, and
    while it stands still for others; `is_broken` once it failed in that."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        on_update: OnUpdate,
        timeout_s: float,
        is_staged: bool = False,
        run: str = "",
        attempt: int = 1,
    ) -> None:
        self.url = url.rstrip("/")
        self._attempt = attempt
        self.life = f"{self.url} {secrets.token_hex(4)}"  # a server that comes back is another to its peers
        self.is_staged = is_staged
        self.num_workers = 1
        self.version: int | None = None
        self.is_broken = False
        self.stall_s = 0.0  # how long it stood still in its last update
        self._still_since = 0.0
        self.tokens_in_flight = 0
        self.failures_in_a_row = 0
        self.given: set[int] = set()  # the versions it was told to take
        self._failed_at = -math.inf
        self._is_closed = False
        self._vocab_size = 0
        self._timeout_s = timeout_s
        self._pause = PAUSES[on_update]
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            headers=({} if token is None else {"Authorization": f"Bearer {token}"})
            | attempt_header(run, attempt),
            timeout=httpx2.Timeout(timeout_s, connect=QUICK_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            transport=httpx2.AsyncHTTPTransport(retries=CONNECTION_ATTEMPTS),
            trust_env=False,  # a proxy of the environment has no business between us and our servers
        )

    def __str__(self) -> str:
        return self.url

    @property
    def cache_salt(self) -> str:
        """Prefixes are shared by requests to the same weights alone. (vLLM refuses an empty salt.)"""
        return "none" if self.version is None else label_of(self._attempt, self.version)

    async def generate(self, body: dict[str, Any]) -> Segment:
        """ServerError: nothing of the answer may be used. RolloutError: no server would answer this."""
        sampling, oldest = body["sampling_params"], self.version
        expected = len(body["token_ids"]) + sampling["max_tokens"]
        self.tokens_in_flight += expected
        begun = time.monotonic()
        try:
            segment = read_segment(
                await self._call("POST", GENERATE, json=body), sampling, self._vocab_size, self._attempt
            )
            self._refuse_foreign(segment, oldest)
        except Rejected as error:
            raise RolloutError(f"the vLLM server {self.url} rejects a request: {error}") from error
        except ConfigError as error:  # it was started again, with another token: no reason to end a run
            raise ServerError(str(error)) from error
        except ServerError:
            if begun >= self._failed_at:  # what was under way together fails together, which counts once
                self.failures_in_a_row += 1
                self._failed_at = time.monotonic()
            raise
        finally:
            self.tokens_in_flight -= expected
        self.failures_in_a_row = 0
        return segment

    async def prove_answer(self) -> None:
        """ServerError for a server that does not answer as it should, whatever it says of itself."""
        request = SampleRequest(0, 0, np.zeros(1, np.int32), 1)
        body = generate_body(request, [], 1, seed=0, eos_token_ids=[], cache_salt=self.cache_salt)
        await self.generate(body)

    def _refuse_foreign(self, segment: Segment, oldest: int | None) -> None:
        """A label is true only where nobody else steers the server."""
        for version in segment.versions:
            if version not in self.given or (oldest is not None and version < oldest):
                raise ServerError(
                    f"it labels tokens with version {version}, but was given {sorted(self.given)} and had taken "
                    f"{oldest}: does another run use it?"
                )

    async def begin_update(self) -> None:
        """Where weights are not staged, the server stands still from here on. One that fails before the end of an
        update is in no state to sample from."""
        self.stall_s = 0.0
        if not self.is_staged:
            await self._stand_still()

    async def receive(self, source: dict[str, Any]) -> None:
        """Take weights from where `updates.py` says; staged, they are then in host memory."""
        if not self.is_staged:
            await self._call("POST", "/update_weights", json=update_body(source))
            return
        begun = time.monotonic()
        await self._ask_workers("stage_weights", json.dumps(source))
        while (states := set(await self._ask_workers("staged_weights"))) != {"there"}:
            if failed := states - {"there", "receiving"}:
                raise ServerError(f"it could not receive weights: {', '.join(sorted(failed))}")
            await asyncio.sleep(max(STAGING_POLL_S, STAGING_POLL_SHARE * (time.monotonic() - begun)))

    async def finish_update(self, version: int) -> None:
        """Go on with what was received."""
        if self.is_staged:
            await self._stand_still()
            await self._call("POST", "/update_weights", json=update_body({}))
        self.given.add(version)
        await self._call(
            "POST", "/finish_weight_update", json={"weight_version": label_of(self._attempt, version)}
        )
        await self._call("POST", "/resume")
        self.stall_s = time.monotonic() - self._still_since
        self.version = version

    async def _stand_still(self) -> None:
        self._still_since = time.monotonic()
        self.version = None
        await self._call("POST", "/pause", params=self._pause, timeout=STEERED_S)
        try:
            await self._call("POST", "/start_weight_update", headers=LAST_ON_IT, timeout=STEERED_S)
        except ServerError as error:
            if "already" not in str(error):
                raise
            # Whoever began that update was killed in it: end it under a label that nobody takes, and begin anew.
            await self._call(
                "POST", "/finish_weight_update", json={"weight_version": "abandoned"}, timeout=STEERED_S
            )
            await self._call("POST", "/start_weight_update", timeout=STEERED_S)

    async def _ask_workers(self, method: str, *arguments: str) -> list[Any]:
        """What each worker answers to a call of `a3po_vllm.staging`."""
        body = {"method": method, "args": arguments}
        return (await self._call("POST", "/collective_rpc", json=body, timeout=STEERED_S))["results"]

    async def check_health(self) -> None:
        try:
            await self._call("GET", "/health", timeout=QUICK_S)
        except TimedOut:
            raise
        except Missing as error:
            raise ConfigError(f"{self.url} is no vLLM server: {error}; give the address of one.") from None
        except Unreachable:  # maybe only a connection that was ending, see LAST_ON_IT
            await self._call("GET", "/health", timeout=QUICK_S)

    async def label(self) -> str:
        """What it calls its weights: vLLM's own word until the first update."""
        return (await self._call("GET", "/weight_info", timeout=QUICK_S))["weight_version"]

    async def is_open(self) -> bool:
        """Whether its control routes answer without a token, so that anybody who reaches it can steer it."""
        bare = self._http.build_request("GET", "/is_paused")
        bare.headers.pop("Authorization", None)
        try:
            return (await self._http.send(bare)).is_success
        except httpx2.HTTPError:
            return False

    async def refuse_unsuitable(self, wanted: Wanted) -> None:
        """ConfigError for a server that cannot do what a run needs, with the version or flag that it lacks."""
        await self._refuse_old()
        routes = (await self._known("/openapi.json", "vLLM's API server"))["paths"]
        for route, flag in (
            (GENERATE, "vLLM >= 0.32 with --enable-scale-out"),
            ("/start_weight_update", "VLLM_SERVER_DEV_MODE=1 in its environment"),
            ("/weight_info", "vLLM >= 0.32"),
        ):
            if route not in routes:
                raise ConfigError(f"the vLLM server {self.url} has no route {route}: start it with {flag}.")
        info = await self._known(
            "/server_info?config_format=json", "VLLM_SERVER_DEV_MODE=1 in its environment"
        )
        for sentence in unsuitable(info["vllm_config"], wanted.max_tokens, wanted.dtype):
            raise ConfigError(f"the vLLM server {self.url} {sentence}")
        await self._refuse_another_model(str(info["vllm_config"]["model_config"]["model"]), wanted.shape)
        self._vocab_size = wanted.shape.vocab_size
        self.num_workers = (await self._known("/get_world_size", "vLLM >= 0.32"))["world_size"]

    async def _refuse_old(self) -> None:
        version = str((await self._known("/version", "vLLM's API server"))["version"])
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
        # One built from sources may call itself 0.1.dev: its routes decide.
        if numbers < OLDEST and "dev" not in version:
            raise ConfigError(
                f"the vLLM server {self.url} is vLLM {version}, which does not say which weights produced which "
                "token: it needs vLLM >= 0.32."
            )

    async def _refuse_another_model(self, model: str, shape: ModelShape) -> None:
        """By the size of the vocabulary, and by the model's own config.json where it can be read here. What is left
        over fails the first update, or is another tokenizer, which is of no account: token ids go in and come out."""
        differences: list[str] = []
        try:
            await self._call("POST", GENERATE, json=vocabulary_body())
        except Rejected as error:
            found = read_vocabulary(str(error))
            if found not in (None, shape.vocab_size):
                differences.append(f"vocab_size {found} instead of {shape.vocab_size}")
        if not differences and (Path(model) / "config.json").is_file():
            theirs = read_model_shape(model)
            differences = [
                f"{name} {getattr(theirs, name)} instead of {getattr(shape, name)}"
                for name in SIZES
                if getattr(theirs, name) != getattr(shape, name)
            ]
        if differences:
            raise ConfigError(
                f"the vLLM server {self.url} serves another model than model.hf_path, {model} "
                f"({', '.join(differences)}): start it with the --model of model.hf_path."
            )

    async def close(self) -> None:
        self._is_closed = True
        await self._http.aclose()

    async def _known(self, path: str, flag: str) -> Any:
        try:
            return await self._call("GET", path)
        except (Missing, Rejected) as error:
            raise ConfigError(
                f"the vLLM server {self.url} does not answer {path} ({error}): it needs {flag}."
            ) from None
        except ServerError as error:  # it may answer later
            raise Unreachable(str(error)) from error

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            # httpx limits the time between two bytes, which an answer that trickles in never exceeds.
            async with asyncio.timeout(options.get("timeout", self._timeout_s)):
                answer = await self._http.request(method, path, **options)
            if answer.status_code in (401, 403):
                raise ConfigError(
                    f"the vLLM server {self.url} refuses {path} with HTTP {answer.status_code}: name the file with its "
                    "bearer token in rollout.token_file, and start it with --enable-scale-out."
                )
            if (newest := answer.headers.get(NEWEST_ATTEMPT)) is not None:
                raise FencedError(
                    f"attempt {self._attempt} is fenced off: the vLLM server {self.url} takes orders of attempt "
                    f"{newest}, which goes on with this run; see that this one's other processes are gone"
                )
            if not answer.is_success:
                kind = KINDS.get(answer.status_code, ServerError)
                raise kind(f"{method} {path} gave HTTP {answer.status_code}: {answer.text[:300]}")
            return answer.json() if answer.content else None
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise TimedOut(f"{method} {path} was not answered in time ({type(error).__name__})") from error
        except httpx2.TransportError as error:
            raise Unreachable(f"{method} {path} failed: {type(error).__name__} {error}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise ServerError(f"{method} {path} failed: {type(error).__name__} {error}") from error
        except RuntimeError as error:
            if not self._is_closed:
                raise
            raise Unreachable(f"{method} {path} failed: the server was given up meanwhile") from error


def unsuitable(config: dict[str, Any], max_tokens: int, dtype: str | None) -> list[str]:
    """What is wrong with a server's own configuration, as /server_info tells it."""
    model = config["model_config"]
    theirs = str(model.get("dtype")).removeprefix("torch.")
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    sentences: list[str] = []
    if model.get("logprobs_mode") != "processed_logprobs":
        sentences.append(
            f"reports {model.get('logprobs_mode')}, not those of the distribution sampled from: start it with "
            "--logprobs-mode processed_logprobs."
        )
    if backend != BACKEND:
        sentences.append(
            f"has the weight-transfer backend {backend}: put megatron_a3po/rollout/vllm/plugin on its PYTHONPATH and "
            f"""start it with --weight-transfer-config '{{"backend": "{BACKEND}"}}'."""
        )
    if (extension := (config.get("parallel_config") or {}).get("worker_extension_cls")) != STAGING:
        sentences.append(
            f"has the worker extension {extension or None}: start it with --worker-extension-cls {STAGING}."
        )
    if model.get("max_model_len", max_tokens) < max_tokens:
        sentences.append(
            f"takes {model['max_model_len']} tokens, but data.max_prompt_tokens + rollout.max_response_tokens is "
            f"{max_tokens}: start it with --max-model-len {max_tokens}."
        )
    if dtype not in (None, theirs):
        sentences.append(f"computes in {theirs}, but the trainer in {dtype}: start it with --dtype {dtype}.")
    return sentences
