"""What is believed of a server's answer, and what is not: no server needed."""

import copy
import math
from typing import Any

import numpy as np
import pytest

from megatron_a3po.rollout.engines.base import SampleRequest
from megatron_a3po.rollout.engines.vllm import Response
from megatron_a3po.rollout.vllm.server import unsuitable
from megatron_a3po.rollout.vllm.wire import Foreign, Segment, ServerError, read_segment, seed_of

ANSWER: dict[str, Any] = {
    "choices": [
        {
            "index": 0,
            "finish_reason": "length",
            "token_ids": [5, 6, 7],
            "logprobs": {"content": [{"token_id": t, "logprob": -t / 10, "rank": 1} for t in (5, 6, 7)]},
            "weight_versions": [
                {"version": "1.3", "start": 0, "end": 1},
                {"version": "1.12", "start": 1, "end": 3},
            ],
        }
    ]
}
REQUEST = SampleRequest(4, 1, np.array([9, 9], np.int32), 6, 0.7)


def test_every_token_has_its_log_prob_and_version():
    segment = read(ANSWER)
    assert segment == Segment([5, 6, 7], [-0.5, -0.6, -0.7], [3, 12, 12], "length")


def broken(**changes: Any) -> dict[str, Any]:
    answer = copy.deepcopy(ANSWER)
    answer["choices"][0].update(changes)
    return answer


def read(answer: Any) -> Segment:
    return read_segment(answer, {"max_tokens": 3, "stop_token_ids": [1]}, vocab_size=64, attempt=1)


SPAN = {"version": "1.3", "start": 0, "end": 3}
LOGP = {"logprob": -0.5}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"choices": []},
        {"choices": [ANSWER["choices"][0]] * 2},
        {"error": {"message": "no"}},
        broken(token_ids=None),
        broken(token_ids=[5, 6]),
        broken(token_ids=[5, 7, 6]),
        broken(logprobs=None),
        broken(logprobs={"content": [{"token_id": 5}]}),
        broken(logprobs={"content": None}),
        broken(weight_versions=None),
        broken(weight_versions=[]),
        broken(weight_versions=[SPAN | {"end": 2}]),
        broken(weight_versions=[SPAN | {"end": 4}]),
        broken(weight_versions=[SPAN | {"start": 1}]),
        broken(weight_versions=[SPAN, SPAN]),
        broken(weight_versions=[SPAN | {"version": "default"}]),
        broken(weight_versions=[SPAN | {"version": None}]),
        broken(weight_versions=[SPAN | {"version": "-1"}]),
        broken(weight_versions=[SPAN | {"version": "1.12", "end": 1}, SPAN | {"start": 1}]),
        broken(token_ids=[5, 6, 64], logprobs={"content": [LOGP | {"token_id": t} for t in (5, 6, 64)]}),
        broken(token_ids=[5, 6, -1], logprobs={"content": [LOGP | {"token_id": t} for t in (5, 6, -1)]}),
        broken(finish_reason="stop"),
        broken(token_ids=[5, 1, 7], logprobs={"content": [LOGP | {"token_id": t} for t in (5, 1, 7)]}),
        broken(token_ids=[5, 6, 1], logprobs={"content": [LOGP | {"token_id": t} for t in (5, 6, 1)]}),
        broken(
            token_ids=[5, 6],
            logprobs={"content": [LOGP | {"token_id": t} for t in (5, 6)]},
            weight_versions=[SPAN | {"end": 2}],
        ),
        broken(finish_reason="error"),
        broken(finish_reason=None),
        broken(token_ids=[], logprobs=None, weight_versions=None),
    ],
    ids=str,
)
def test_an_answer_that_does_not_fit_together_is_refused_whole(answer: Any):
    with pytest.raises(ServerError):
        read(answer)


def test_tokens_of_another_attempt_are_refused_and_counted():
    """All of an answer: a server that changed hands in between is believed in nothing."""
    spans = [SPAN | {"end": 1}, SPAN | {"version": "2.3", "start": 1}]
    with pytest.raises(Foreign, match="version 3 of attempt 2, and this is attempt 1") as caught:
        read(broken(weight_versions=spans))
    assert caught.value.num_tokens == 3


def test_an_abort_may_come_before_the_first_token():
    answer = broken(token_ids=[], logprobs=None, weight_versions=None, finish_reason="abort")
    assert read(answer) == Segment([], [], [], "abort")


def test_a_log_prob_that_json_cannot_say_stays_non_finite():
    content = [{"token_id": t, "logprob": -9999.0} for t in (5, 6, 7)]
    assert read(broken(logprobs={"content": content})).logps == [-math.inf] * 3


def test_random_numbers_differ_by_seed_prompt_sample_and_position():
    keys = [
        (seed, prompt, sample, at)
        for seed in (0, 1)
        for prompt in (0, 1)
        for sample in (0, 1)
        for at in (0, 512)
    ]
    seeds = [seed_of(s, SampleRequest(p, n, REQUEST.prompt_tokens, 4), at) for s, p, n, at in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [seed_of(s, SampleRequest(p, n, REQUEST.prompt_tokens, 4), at) for s, p, n, at in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_response_goes_on_after_an_abort_and_keeps_what_was_confirmed():
    response = Response(REQUEST, one_version=False)
    response.add(Segment([5, 6], [-0.1, -0.2], [3, 3], "length"))
    response.add(Segment([7], [-0.3], [4], "abort"))
    assert response.finish_reason is None
    response.add(Segment([8, 1], [-0.4, -0.5], [4, 5], "stop"))
    sample = response.sample()
    assert sample.finish_reason == "stop"
    assert sample.tokens.tolist() == [5, 6, 7, 8, 1]
    assert sample.versions.tolist() == [3, 3, 4, 4, 5]


def test_a_response_of_one_version_begins_anew_where_another_reaches_it():
    response = Response(REQUEST, one_version=True)
    for segment in (
        Segment([5, 6], [-0.1, -0.2], [3, 3], "length"),
        Segment([7], [-0.3], [4], "length"),
        Segment([5], [-0.3], [4], "abort"),
        Segment([5, 6], [-0.3, -0.3], [4, 5], "stop"),
    ):
        response.add(segment)
        assert response.finish_reason is None
    assert response.num_missing == REQUEST.max_response_tokens
    response.add(Segment([5, 6, 7, 8, 9, 10], [-0.1] * 6, [5] * 6, "length"))
    assert response.sample().finish_reason == "length"


GOOD = {
    "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 512, "dtype": "torch.float32"},
    "weight_transfer_config": {"backend": "a3po"},
    "parallel_config": {"worker_extension_cls": "a3po_vllm.staging.Staging"},
}


@pytest.mark.parametrize(
    ("section", "change", "flag"),
    [
        ("model_config", {"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ("model_config", {"max_model_len": 511}, "--max-model-len 512"),
        ("model_config", {"dtype": "torch.bfloat16"}, "--dtype float32"),
        ("weight_transfer_config", {"backend": "nccl"}, "--weight-transfer-config"),
        ("weight_transfer_config", None, "PYTHONPATH"),
        ("parallel_config", {"worker_extension_cls": ""}, "--worker-extension-cls a3po_vllm.staging.Staging"),
    ],
)
def test_a_server_started_without_a_flag_is_told_which(section: str, change: dict | None, flag: str):
    assert unsuitable(GOOD, 512, "float32") == unsuitable(GOOD, 512, None) == []
    changed = None if change is None else GOOD[section] | change
    (sentence,) = unsuitable(GOOD | {section: changed}, 512, "float32")
    assert flag in sentence
