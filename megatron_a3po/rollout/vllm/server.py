"""One vLLM server over HTTP: a segment generated, new weights taken, what it says of itself. `fleet.py` has them all.

Every failure is a ServerError, whatever its kind: who asked goes elsewhere, and the fleet looks after the server. Only
what a person must mend is a ConfigError.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import httpx2

from megatron_a3po.errors import ConfigError
from megatron_a3po.rollout.vllm.wire import (
    BACKEND,
    GENERATE,
    Segment,
    ServerError,
    label_of,
    read_segment,
    update_body,
)

logger = logging.getLogger(__name__)

OnUpdate = Literal["recompute_kv", "keep_kv", "restart"]
QUICK_S = 10.0
CONNECTION_ATTEMPTS = 2

# How a server takes an update: what becomes of its requests under way, and of the caches of their prefixes.
PAUSES: dict[OnUpdate, dict[str, str]] = {
    "recompute_kv": {"mode": "keep", "clear_cache": "true"},
    "keep_kv": {"mode": "keep", "clear_cache": "false"},
    "restart": {"mode": "abort", "clear_cache": "true"},
}


class Server:
    """A handle; whether it gets work is the fleet's decision. `version` is None until weights of ours are in it."""

    def __init__(self, url: str, *, token: str | None, on_update: OnUpdate, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.version: int | None = None
        self.tokens_in_flight = 0
        self._pause = PAUSES[on_update]
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx2.Timeout(timeout_s, connect=QUICK_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            transport=httpx2.AsyncHTTPTransport(retries=CONNECTION_ATTEMPTS),
            trust_env=False,  # a proxy of the environment has no business between us and our servers
        )

    def __str__(self) -> str:
        return self.url

    async def generate(self, body: dict[str, Any]) -> Segment:
        expected = len(body["token_ids"]) + body["sampling_params"]["max_tokens"]
        self.tokens_in_flight += expected
        try:
            return read_segment(await self._call("POST", GENERATE, json=body))
        finally:
            self.tokens_in_flight -= expected

    async def update(self, version: int, directory: Path) -> None:
        """Take the weights of a directory. A server that fails in between is in no state to sample from."""
        self.version = None
        await self._call("POST", "/pause", params=self._pause)
        await self._call("POST", "/start_weight_update")
        await self._call("POST", "/update_weights", json=update_body(directory))
        await self._call("POST", "/finish_weight_update", json={"weight_version": label_of(version)})
        await self._call("POST", "/resume")
        self.version = version

    async def check_health(self) -> None:
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

    async def refuse_unsuitable(self, max_tokens: int) -> None:
        """ConfigError for a server that cannot do what a run needs, with the version or flag that it lacks."""
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
        for sentence in unsuitable(info["vllm_config"], max_tokens):
            raise ConfigError(f"the vLLM server {self.url} {sentence}")

    async def close(self) -> None:
        await self._http.aclose()

    async def _known(self, path: str, flag: str) -> Any:
        try:
            return await self._call("GET", path)
        except ServerError as error:
            raise ConfigError(
                f"the vLLM server {self.url} does not answer {path} ({error}): it needs {flag}."
            ) from None

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = await self._http.request(method, path, **options)
            if answer.status_code in (401, 403):
                raise ConfigError(
                    f"the vLLM server {self.url} refuses {path} with HTTP {answer.status_code}: name the file with its "
                    "bearer token in rollout.token_file, and start it with --enable-scale-out."
                )
            if not answer.is_success:
                raise ServerError(f"{method} {path} gave HTTP {answer.status_code}: {answer.text[:300]}")
            return answer.json() if answer.content else None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise ServerError(f"{method} {path} failed: {type(error).__name__} {error}") from error


def unsuitable(config: dict[str, Any], max_tokens: int) -> list[str]:
    """What is wrong with a server's own configuration, as /server_info tells it."""
    model = config["model_config"]
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
    if model.get("max_model_len", max_tokens) < max_tokens:
        sentences.append(
            f"takes {model['max_model_len']} tokens, but data.max_prompt_tokens + rollout.max_response_tokens is "
            f"{max_tokens}: start it with --max-model-len {max_tokens}."
        )
    return sentences
