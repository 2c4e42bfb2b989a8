"""What goes over the wire to a vLLM server and comes back: plain dictionaries on one side, a Segment on the other.

Token ids in and out through /inference/v1/generate, the one route that reports which weights produced which tokens.
An answer is believed only as a whole: whatever does not fit together is a ServerError, and nothing of it is used.
The label of a weight version is written and read here and nowhere else. Next: `server.py`, which sends these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.trajectory import FinishReason

GENERATE = "/inference/v1/generate"
BACKEND = "disk"
# What vLLM writes for a log-prob of minus infinity or NaN, JSON having neither.
NO_LOGP = -9999.0


class ServerError(Exception):
    """A server failed, or answered what cannot be used: its work goes elsewhere."""


class Unreachable(ServerError):
    """Nothing answers there now; later something may."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one response, confirmed by the server: each with its log-prob and version."""

    tokens: list[int]
    logps: list[float]
    versions: list[int]
    finish_reason: FinishReason


def label_of(version: int) -> str:
    return str(version)


def version_of(label: Any) -> int:
    if not isinstance(label, str) or not label.isdecimal():
        raise ServerError(f"it labels tokens with the weight version {label!r}, which was never published")
    return int(label)


def seed_of(seed: int, request: SampleRequest, position: int) -> int:
    """A segment has random numbers of its own: the same ones again would repeat the segment before."""
    entropy = [seed, request.prompt_index, request.sample, position]
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


def update_body(directory: Path) -> dict[str, Any]:
    return {"update_info": {"directory": str(directory.resolve())}}


def read_segment(answer: Any) -> Segment:
    """The answer to `generate_body`; ServerError where anything is missing or contradicts itself."""
    try:
        (choice,) = answer["choices"]
        tokens, spans = choice["token_ids"] or [], choice["weight_versions"]
        content = (choice["logprobs"] or {}).get("content") or []
        finish_reason = choice["finish_reason"]
        pairs = [(int(entry["token_id"]), float(entry["logprob"])) for entry in content]
        ends = [(version_of(span["version"]), int(span["start"]), int(span["end"])) for span in spans or []]
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
    versions = [version for version, start, end in ends for _ in range(start, end)]
    bounds = [bound for _, start, end in ends for bound in (start, end)]
    if bounds != sorted(bounds) or (ends and bounds[0] != 0) or len(versions) != len(tokens):
        raise ServerError(f"its version spans {ends} do not cover its {len(tokens)} tokens")
    return Segment(
        tokens, [logp if logp > NO_LOGP else -math.inf for _, logp in pairs], versions, finish_reason
    )
