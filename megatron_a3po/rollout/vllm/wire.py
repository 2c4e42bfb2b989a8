"""What goes over the wire to a vLLM server and comes back: plain dictionaries on one side, a Segment on the other.

Token ids in and out through /inference/v1/generate, the one route that reports which weights produced which tokens.
An answer is believed only as a whole: whatever does not fit together is a ServerError, and nothing of it is used.
The label of a weight version is written and read here and nowhere else. Next: `server.py`, which sends these.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.trajectory import FinishReason

GENERATE = "/inference/v1/generate"
BACKEND = "a3po"
STAGING = "a3po_vllm.staging.Staging"
# What vLLM writes for a log-prob of minus infinity or NaN, JSON having neither.
NO_LOGP = -9999.0
NEWEST_ATTEMPT = "a3po-newest-attempt"  # of an answer that refuses a lower one: plugin/a3po_vllm/fence.py


class ServerError(Exception):
    """A server failed, or answered what cannot be used: its work goes elsewhere."""


class Unreachable(ServerError):
    """Nothing answers there now, or the connection broke; later something may."""


class TimedOut(Unreachable):
    """The answer did not come in time."""


class Rejected(ServerError):
    """It understood the request and will not answer it: another server would not either."""


class Missing(ServerError):
    """It has no such route: it is something else, or was started without what opens it."""


class Foreign(ServerError):
    """It sampled with weights of another attempt at the run: `num_tokens` that nobody may train on."""

    num_tokens = 0


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one response, confirmed by the server: each with its log-prob and version."""

    tokens: list[int]
    logps: list[float]
    versions: list[int]
    finish_reason: FinishReason


def label_of(attempt: int, version: int) -> str:
    """What a server calls weights: two attempts at a run may make different ones of the same version."""
    return f"{attempt}.{version}"


def attempt_header(run: str, attempt: int) -> dict[str, str]:
    """Who asks, as `plugin/a3po_vllm/fence.py` reads it; nothing where the run has no name."""
    return {"a3po-attempt": f"{run} {attempt}"} if run else {}


def version_of(label: Any, attempt: int) -> int:
    found = re.fullmatch(r"(\d+)\.(\d+)", label) if isinstance(label, str) else None
    if found is None:
        raise ServerError(f"it labels tokens with the weight version {label!r}, which was never published")
    if int(found[1]) != attempt:
        raise Foreign(
            f"it labels tokens with version {found[2]} of attempt {found[1]}, and this is attempt {attempt}"
        )
    return int(found[2])


def seed_of(seed: int, request: SampleRequest, position: int) -> int:
    """A segment has random numbers of its own: the same ones again would repeat the segment before."""
    entropy = [
        seed,
        request.prompt_index,
        request.sample,
        position,
        *([request.turn] if request.turn else []),
    ]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def generate_body(
    request: SampleRequest,
    tokens: Sequence[int],
    max_tokens: int,
    *,
    seed: int,
    eos_token_ids: Sequence[int],
    cache_salt: str,
) -> dict[str, Any]:
    """Go on after the prompt and `tokens`. Whatever shapes the distribution is said, nothing left to defaults."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": 0.0 if request.greedy else request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # The model's own list ends a response, not what lies beside the weights of the server.
        "stop_token_ids": list(eos_token_ids),
        "ignore_eos": True,
        "seed": seed_of(seed, request, len(tokens)),
        "logprobs": 0,
        "detokenize": False,
    }
    return {
        "token_ids": [*request.prompt_tokens.tolist(), *tokens],
        "sampling_params": sampling,
        "cache_salt": cache_salt,
        "stream": False,
    }


def vocabulary_body() -> dict[str, Any]:
    """A request that no server grants: the sentence it is rejected with has the size of the vocabulary. (A prompt with
    a token beyond the vocabulary is no way to ask: it ends vLLM's engine.)"""
    sampling = {"max_tokens": 1, "stop_token_ids": [2**31 - 1]}
    return {"token_ids": [0], "sampling_params": sampling, "stream": False}


def read_vocabulary(rejection: str) -> int | None:
    """None where the sentence is another one."""
    found = re.search(r"[Vv]ocabulary size: (\d+)", rejection)
    return None if found is None else int(found[1])


def update_body(source: dict[str, Any]) -> dict[str, Any]:
    return {"update_info": {"source": source}}


def read_segment(answer: Any, sampling: Mapping[str, Any], vocab_size: int, attempt: int) -> Segment:
    """The answer to a `generate_body` with this `sampling_params`; ServerError where anything is missing, contradicts
    itself or was not asked for."""
    tokens: list[int] = []
    try:
        (choice,) = answer["choices"]
        tokens, spans = choice["token_ids"] or [], choice["weight_versions"]
        content = (choice["logprobs"] or {}).get("content") or []
        finish_reason = choice["finish_reason"]
        pairs = [(int(entry["token_id"]), float(entry["logprob"])) for entry in content]
        ends = [
            (version_of(span["version"], attempt), int(span["start"]), int(span["end"]))
            for span in spans or []
        ]
    except Foreign as error:
        error.num_tokens = len(tokens)
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ServerError(f"its answer is not what {GENERATE} of vLLM 0.32 gives ({error!r})") from error
    if finish_reason not in ("stop", "length", "abort"):
        raise ServerError(f"a response ended with the reason {finish_reason!r}")
    if tokens and not ends:
        raise ServerError(
            "its answer does not say which weight version produced which token: vLLM >= 0.32 does"
        )
    if [token for token, _ in pairs] != tokens or (not tokens and finish_reason != "abort"):
        raise ServerError(f"it answered with {len(tokens)} tokens and {len(pairs)} log-probs of them")
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in tokens):
        raise ServerError(f"it answered with tokens beyond the vocabulary of {vocab_size}")
    _check_length(tokens, finish_reason, sampling)
    versions = [version for version, start, end in ends for _ in range(start, end)]
    bounds = [bound for _, start, end in ends for bound in (start, end)]
    if bounds != sorted(bounds) or (ends and bounds[0] != 0) or len(versions) != len(tokens):
        raise ServerError(f"its version spans {ends} do not cover its {len(tokens)} tokens")
    if versions != sorted(versions):
        raise ServerError(f"its version spans {ends} go back to older weights")
    return Segment(
        tokens, [logp if logp > NO_LOGP else -math.inf for _, logp in pairs], versions, finish_reason
    )


def _check_length(tokens: Sequence[int], finish_reason: str, sampling: Mapping[str, Any]) -> None:
    """A response that ends early, or goes on beyond its end, would be trained on as if the policy had done that."""
    asked, ends = sampling["max_tokens"], sampling["stop_token_ids"]
    stops = [at for at, token in enumerate(tokens) if token in ends]
    as_said = {"length": len(tokens) == asked, "stop": stops == [len(tokens) - 1], "abort": True}[
        finish_reason
    ]
    if not as_said or len(tokens) > asked or (stops and finish_reason != "stop"):
        raise ServerError(
            f"it answered with {len(tokens)} of {asked} tokens, the end of a response at {stops}, and calls that "
            f"{finish_reason!r}"
        )
