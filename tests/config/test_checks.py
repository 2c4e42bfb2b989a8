"""What is accepted, at the edges of what is refused. The refusals themselves are in tests/test_main.py."""

from pathlib import Path

import pytest

from megatron_a3po.config.checks import data_parallel_size
from megatron_a3po.errors import ConfigError
from tests.run_files import ROWS, write_rows


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor.use_decoupled_loss=false", "rollout.max_staleness=8"],
        ["actor.use_decoupled_loss=false", "actor.prox_logp_method=recompute", "actor.behave_weight=off"],
        ["actor.prox_logp_method=loglinear", "rollout.max_staleness=8"],
        ["actor.prox_logp_method=metrics", "actor.recompute_every_token=true"],
        ["actor.behave_weight=off", "rollout.max_staleness=0"],
        ["actor.behave_weight=off_at_any_staleness", "rollout.max_staleness=4"],
        ["actor.behave_weight=mask"],
        ["actor.advantage=dr_grpo", "actor.loss_mean=constant"],
        ["actor.advantage=reinforce_pp", "rollout.samples_per_prompt=1", "rollout.filter_no_signal=false"],
        ["rollout.fixed_staleness=3"],
        ["rollout.staleness_policy=drop", "rollout.max_staleness=0"],
        ["rollout.top_k=0", "rollout.temperature=0.7"],
        ["actor.num_mini_batches=8"],
        ["actor.tensor_model_parallel_size=2", "actor.sequence_parallel=true"],
        ["actor.pipeline_model_parallel_size=2", "actor.virtual_pipeline_model_parallel_size=2"],
        ["actor.data_parallel_size=64"],
        ["actor.overlap_param_gather=true", "actor.overlap_grad_reduce=true"],
        ["actor.max_tokens_per_micro_batch=48"],
        ["rollout.max_response_tokens=240"],
        ["actor.lr_warmup_iters=9"],
        ["warm_start.steps=11"],
        ["trainer.evaluate_every=5", "data.held_out=HERE/held_out.jsonl"],
        ["trainer.replay=HERE/model", "reward=null", "data.train=not_read.jsonl"],
        ["reward={type: math}"],
        ["reward={type: function, path: 'json:loads'}"],
    ],
    ids=" ".join,
)
def test_accepted(load, run_file: Path, overrides: list[str]):
    load(*[override.replace("HERE", str(run_file.parent)) for override in overrides])


def test_effective_staleness(load):
    assert (load().rollout.bound, load().rollout.policy) == (1, "wait")
    assert load("rollout.max_staleness=0").rollout.bound == 0
    assert load("rollout.max_staleness=4", "rollout.staleness_policy=train").rollout.policy == "train"
    fixed = load("rollout.fixed_staleness=3").rollout
    assert (fixed.bound, fixed.drops_no_signal) == (3, False)
    assert load().rollout.drops_no_signal


def test_data_parallel_size(load):
    tensor_two = "actor.tensor_model_parallel_size=2"
    assert data_parallel_size(load(tensor_two), None) == 1
    assert data_parallel_size(load(tensor_two, "actor.data_parallel_size=3"), None) == 3
    assert data_parallel_size(load(tensor_two), 8) == 4
    assert data_parallel_size(load(tensor_two, "actor.data_parallel_size=4"), 8) == 4
    with pytest.raises(ConfigError, match=r"actor\.data_parallel_size is 3"):
        data_parallel_size(load(tensor_two, "actor.data_parallel_size=3"), 8)
    with pytest.raises(ConfigError, match="multiple of 2"):
        data_parallel_size(load(tensor_two), 7)


def test_all_kinds_of_prompts(load, run_file: Path):
    rows = [
        {"prompt": "a", "answer": 3},
        {"question": "a", "answer": "so\n#### 3"},
        {"messages": [{"role": "user", "content": "a"}], "answer": "3", "anything": [1]},
    ]
    write_rows(run_file.parent / "train.jsonl", [*rows, *ROWS])
    load()
