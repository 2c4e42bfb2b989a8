"""The decoder against plain forwards of the model, and against itself when disturbed."""

import copy

import numpy as np
import pytest
import torch

from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.decoder import Decoder
from megatron_a3po.rollout.engines.random_numbers import sample_uniforms
from tests.rollout.tiny import EOS_ID, tiny_model

VOCABULARY = 17
TOLERANCE = 1e-5


def requests(
    count: int, *, length: int = 24, greedy: bool = False, temperature: float = 1.0
) -> list[SampleRequest]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, VOCABULARY, rng.integers(1, 9)).astype(np.int32) for _ in range(count)]
    lengths = rng.integers(1, length, count).tolist()
    return [
        SampleRequest(index // 2, index % 2, prompts[index], lengths[index], temperature, greedy)
        for index in range(count)
    ]


def run(decoder: Decoder, wanted: list[SampleRequest], update_at: dict | None = None) -> list[Sample]:
    """Decode all; `update_at` maps a step to a function called before it, after which the version is one more."""
    for number, request in enumerate(wanted):
        decoder.add(request, number)
    done: dict = {}
    step = version = 0
    while not decoder.idle:
        if change := (update_at or {}).get(step):
            change()
            decoder.invalidate()
            version += 1
        done.update({one.ticket: one.sample for one in decoder.step(version)})
        step += 1
    return [done[number] for number in range(len(wanted))]


def plain_logps(model: torch.nn.Module, request: SampleRequest, sample: Sample) -> np.ndarray:
    tokens = torch.from_numpy(np.concatenate([request.prompt_tokens, sample.tokens]).astype(np.int64))
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0].float() / request.temperature
    logps = torch.log_softmax(logits, -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return logps[len(request.prompt_tokens) - 1 :].numpy()


@pytest.mark.parametrize("max_rows", [1, 5, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_plain_forward(max_rows: int, temperature: float):
    model, wanted = tiny_model(0), requests(24, temperature=temperature)
    for request, sample in zip(wanted, run(Decoder(model, [EOS_ID], 7, max_rows), wanted)):
        np.testing.assert_allclose(sample.logps, plain_logps(model, request, sample), atol=TOLERANCE, rtol=0)
        assert sample.logps.dtype == np.float32
        assert (sample.versions == 0).all()
        stopped = sample.tokens[-1] == EOS_ID
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.tokens) == request.max_response_tokens
        assert EOS_ID not in sample.tokens[:-1]


def test_a_token_depends_on_its_own_random_numbers_alone():
    model, wanted = tiny_model(0), requests(24)
    together = run(Decoder(model, [EOS_ID], 7, 64), wanted)
    for request, sample in zip(wanted, together):
        (alone,) = run(Decoder(model, [EOS_ID], 7, 1), [request])
        np.testing.assert_array_equal(alone.tokens, sample.tokens)
    other_seed = run(Decoder(model, [EOS_ID], 8, 64), wanted)
    assert any(
        len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(together, other_seed)
    )


def test_an_interruption_does_not_disturb_the_random_numbers():
    model, wanted = tiny_model(0), requests(24)
    undisturbed = run(Decoder(model, [EOS_ID], 7, 16), wanted)
    disturbed = run(Decoder(model, [EOS_ID], 7, 16), wanted, {step: lambda: None for step in range(1, 40, 3)})
    assert any(len(set(sample.versions.tolist())) > 1 for sample in disturbed)
    for before, after in zip(undisturbed, disturbed):
        np.testing.assert_array_equal(before.tokens, after.tokens)
        np.testing.assert_allclose(before.logps, after.logps, atol=TOLERANCE, rtol=0)


def test_after_an_update_tokens_are_of_the_new_weights_with_the_whole_prefix_computed_again():
    old, new = tiny_model(0), tiny_model(1)
    served, wanted = copy.deepcopy(old), requests(24)
    samples = run(Decoder(served, [], 7, 24), wanted, {6: lambda: served.load_state_dict(new.state_dict())})
    crossing = 0
    for request, sample in zip(wanted, samples):
        assert (np.diff(sample.versions) >= 0).all()
        first_new = int((sample.versions == 0).sum())
        by_old, by_new = plain_logps(old, request, sample), plain_logps(new, request, sample)
        np.testing.assert_allclose(sample.logps[:first_new], by_old[:first_new], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(sample.logps[first_new:], by_new[first_new:], atol=TOLERANCE, rtol=0)
        if 0 < first_new < len(sample.tokens):
            crossing += 1
            assert first_new == 6  # all began with the first step, and the update came before the seventh
            assert abs(sample.logps[first_new] - by_old[first_new]) > 100 * TOLERANCE
    assert crossing >= 4


def test_the_first_token_has_the_models_distribution():
    model, prompt, count = tiny_model(0), np.array([3, 11, 4, 12], np.int32), 4000
    wanted = [SampleRequest(index, 0, prompt, 1, 0.8) for index in range(count)]
    samples = run(Decoder(model, [], 7, 500), wanted)
    frequency = np.bincount([sample.tokens[0] for sample in samples], minlength=VOCABULARY) / count
    with torch.inference_mode():
        wanted_probability = torch.softmax(model(torch.tensor(prompt[None])).logits[0, -1] / 0.8, -1).numpy()
    np.testing.assert_allclose(frequency, wanted_probability, atol=4 * 0.5 / count**0.5)


def test_greedy_is_the_most_probable_token():
    model, wanted = tiny_model(2), requests(8, greedy=True)
    for request, sample in zip(wanted, run(Decoder(model, [EOS_ID], 7, 8), wanted)):
        tokens = request.prompt_tokens
        for token in sample.tokens:
            with torch.inference_mode():
                assert int(model(torch.tensor(tokens[None])).logits[0, -1].argmax()) == token
            tokens = np.append(tokens, token)


def test_greedy_and_sampled_rows_share_a_batch():
    model = tiny_model(0)
    sampled, greedy = requests(6), requests(6, greedy=True)
    apart = run(Decoder(model, [EOS_ID], 7, 16), sampled) + run(Decoder(model, [EOS_ID], 7, 16), greedy)
    for one, other in zip(apart, run(Decoder(model, [EOS_ID], 7, 16), sampled + greedy)):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_probability_of_zero_is_never_sampled():
    model = tiny_model(0)
    decoder = Decoder(model, [], 7, 1)
    decoder.add(SampleRequest(0, 0, np.array([3], np.int32), 1), 0)
    decoder._fill_rows()
    logits = torch.full((1, VOCABULARY), float("-inf"))
    logits[0, [4, 9]] = 0.0
    for uniform, wanted in [(0.0, 4), (0.49, 4), (0.5, 9), (1 - 2**-53, 9)]:
        decoder._uniforms[0, 1] = uniform
        tokens, logps = decoder._sample(logits)
        assert tokens.tolist() == [wanted]
        np.testing.assert_allclose(logps, np.log(0.5), rtol=1e-6)


def test_random_numbers_are_a_function_of_their_keys():
    numbers = sample_uniforms(1, 2, 3, 50)
    np.testing.assert_array_equal(numbers[:20], sample_uniforms(1, 2, 3, 20))
    others = [sample_uniforms(*keys, 50) for keys in [(0, 2, 3), (1, 3, 3), (1, 2, 4)]]
    assert not any((numbers == other).any() for other in others)
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_abort_ends_running_and_queued_requests():
    decoder = Decoder(tiny_model(0), [], 7, 2)
    for number, request in enumerate(requests(4, length=20)):
        decoder.add(SampleRequest(number, 0, request.prompt_tokens, 10), number)
    decoder.step(0)
    aborted = {one.ticket: one.sample for one in decoder.abort()}
    assert decoder.idle
    assert [len(aborted[number].tokens) for number in range(4)] == [1, 1, 0, 0]
    assert {sample.finish_reason for sample in aborted.values()} == {"abort"}
