"""The lines said at start, against numbers worked out by hand."""

from pathlib import Path

import pytest

from megatron_a3po.config import read_model_shape
from megatron_a3po.config.cautions import cautions
from megatron_a3po.config.plan import expected_forwards, plan_lines
from tests.run_files import write_model


def plan(config, data_parallel_size: int = 1) -> str:
    return "\n".join(plan_lines(config, read_model_shape(config.model.hf_path), data_parallel_size))


def test_grid(load):
    config = load("actor.tensor_model_parallel_size=2", "actor.pipeline_model_parallel_size=2")
    text = plan(config, 2)
    assert "8 ranks = data 2 x pipeline 2 x tensor 2" in text
    assert "dp 0: pp 0: ranks 0-1, pp 1: ranks 4-5" in text
    assert "dp 1: pp 0: ranks 2-3, pp 1: ranks 6-7" in text


def test_batch_arithmetic(load):
    text = plan(load("actor.num_mini_batches=4"))
    assert "8 prompts x 8 samples = 64 trajectories" in text
    assert (
        "in 4 mini-batches of 16 and so 4 optimizer steps; 10 training steps make 40 optimizer steps" in text
    )
    assert "at most 16384 tokens (a micro-batch)\n" in text
    assert "at most 48 tokens, 32 of them trained" in text


def test_several_copies_run_equally_many_forwards(load):
    assert "(a micro-batch); the 2 copies of the model run equally many\n" in plan(load(), 2)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            [],
            "saved      when a signal stops the run; a kill costs all its steps: trainer.save_every is not set",
        ),
        (["trainer.save_every=1"], "saved      after every step; 2 checkpoints kept"),
        (
            ["trainer.save_every=20", "trainer.keep_last=1", "warm_start={steps: 30}"],
            "saved      after the warm start, and after every 20 steps; 1 checkpoint kept",
        ),
    ],
)
def test_what_a_kill_costs(load, overrides: list[str], sentence: str):
    assert f"{sentence}\n" in plan(load(*overrides)) + "\n"


@pytest.mark.parametrize(
    ("tensor_size", "divisor", "padded", "sentence"),
    [
        (1, 1, 30, "vocabulary of 30 tokens"),
        (2, 1, 30, "vocabulary of 30 tokens, 15 on each tensor rank"),
        (1, 8, 32, "vocabulary of 30 tokens, padded to 32"),
        (2, 8, 32, "vocabulary of 30 tokens, padded to 32, 16 on each tensor rank"),
    ],
)
def test_padded_vocabulary(load, tensor_size: int, divisor: int, padded: int, sentence: str):
    config = load(
        f"actor.tensor_model_parallel_size={tensor_size}", f"actor.make_vocab_size_divisible_by={divisor}"
    )
    assert config.actor.padded_vocab_size(30) == padded
    assert f"{sentence}\n" in plan(config)


@pytest.mark.parametrize(
    ("overrides", "forwards", "sentence"),
    [
        (["actor.use_decoupled_loss=false", "actor.num_mini_batches=4"], 1.0, "around the behaviour policy"),
        (["actor.prox_logp_method=loglinear", "actor.num_mini_batches=4"], 1.0, "interpolated"),
        (["actor.prox_logp_method=linear"], 1.0, "interpolated"),
        ([], 1.0, "its own log-probs are the proximal policy's"),
        (["actor.num_mini_batches=4"], 1.75, "2 to 4, whose proximal log-probs are recomputed"),
        (["actor.prox_logp_method=metrics", "actor.num_mini_batches=2"], 1.5, "recomputed"),
        (["actor.recompute_every_token=true", "actor.num_mini_batches=4"], 2.0, "recompute_every_token"),
        (
            ["actor.prox_logp_method=loglinear", "actor.kl_coef=0.1"],
            2.0,
            "and 1 with the weights of the frozen",
        ),
        (["actor.kl_coef=0.1", "actor.num_mini_batches=4"], 2.75, "and 1 with the weights of the frozen"),
    ],
)
def test_forwards(load, overrides: list[str], forwards: float, sentence: str):
    config = load(*overrides)
    assert expected_forwards(config) == forwards
    assert f"forwards   {forwards:g} for each token" in plan(config)
    assert sentence in plan(config)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["actor.prox_logp_method=linear"], "anchor     A-3PO's, interpolated in probabilities"),
        (["actor.eps_high=0.28", "actor.dual_clip=3"], "[0.8, 1.28], dual clip at 3"),
        (["actor.behave_weight_cap=2"], "weight     pi_prox / pi_behave, at most 2"),
        (["actor.use_decoupled_loss=false"], "weight     1 (coupled loss)"),
        (
            ["actor.importance_ratio=sequence"],
            "takes two sweeps over the vocabulary, 4 matrix products instead of 3",
        ),
        (["actor.entropy_coef=0.01"], "averaged by token, less 0.01 times the entropy"),
        (["actor.kl_coef=0.1"], "averaged by token, plus 0.1 times the divergence from the reference"),
        (["actor.kl_coef=0.1"], "has a second copy of its weights in host memory"),
        (["rollout.max_staleness=4"], "at most 4, policy wait"),
        (["rollout.fixed_staleness=4"], "exactly 4 versions old"),
        (["warm_start.steps=20"], "20 supervised steps of 64 examples"),
    ],
)
def test_method_and_samples(load, overrides: list[str], sentence: str):
    assert sentence in plan(load(*overrides))


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["actor.prox_logp_method=linear", "rollout.max_staleness=6"], "never clipped from above"),
        (["actor.use_decoupled_loss=false"], "actor.use_decoupled_loss is false at a staleness bound of 1"),
        ([], "with one mini-batch never clips"),
        (["actor.prox_logp_method=metrics"], "with one mini-batch never clips"),
        (
            ["actor.importance_ratio=sequence"],
            "with actor.loss_mean=token counts a sequence once for each of",
        ),
        (["actor.importance_ratio=sequence", "actor.loss_mean=sequence"], "it may never be clipped"),
        (["rollout.staleness_policy=train"], "is soft"),
        (["actor.behave_weight=off_at_any_staleness"], "uncorrected"),
        (["rollout.fixed_staleness=1"], "same composition"),
    ],
)
def test_cautions(load, overrides: list[str], fragment: str):
    config = load(*overrides)
    assert any(fragment in sentence for sentence in cautions(config))
    assert fragment in plan(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor.prox_logp_method=linear", "rollout.max_staleness=5"],
        ["actor.prox_logp_method=loglinear", "rollout.max_staleness=60"],
        ["actor.use_decoupled_loss=false", "rollout.max_staleness=0"],
        ["actor.num_mini_batches=2"],
        [
            "actor.num_mini_batches=2",
            "actor.importance_ratio=sequence",
            "actor.loss_mean=sequence",
            "actor.eps_low=3e-4",
            "actor.eps_high=4e-4",
        ],
    ],
)
def test_nothing_to_be_cautious_about(load, overrides: list[str]):
    config = load(*overrides)
    assert cautions(config, read_model_shape(config.model.hf_path)) == []


def test_code_beside_a_model_is_named_and_not_run(load, run_file: Path):
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    write_model(run_file.parent / "model", auto_map=own)
    assert (
        f"{run_file.parent}/model/config.json names code of its own (auto_map), which is never run"
        in plan(load())
    )
