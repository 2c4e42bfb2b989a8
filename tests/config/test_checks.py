"""What is accepted, at the edges of what is refused. The refusals themselves are in tests/test_main.py."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_a3po.config.checks import data_parallel_size
from megatron_a3po.errors import ConfigError
from megatron_a3po.trainer.batch import batch_path
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
        ["actor.importance_ratio=sequence", "actor.loss_mean=sequence", "actor.eps_low=3e-4"],
        ["actor.importance_ratio=sequence", "actor.advantage=dr_grpo", "actor.loss_mean=constant"],
        ["actor.entropy_coef=0.01", "actor.kl_coef=0.1"],
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
        ["reward={type: math}"],
        ["reward={type: function, path: 'json:loads'}"],
        ["reward={type: function, path: 'math:sqrt'}"],
        ["reward={type: function, path: 'os.path:join'}"],
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
    (run_file.parent / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    load()


def test_other_rewards_take_answers_without_a_number(load, run_file: Path):
    write_rows(run_file.parent / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    load("reward.type=math")
    with pytest.raises(ConfigError, match=r"train\.jsonl:1 has the answer"):
        load()


def keep_batches(folder: Path, steps: Iterable[int]) -> None:
    folder.mkdir()
    for step in steps:
        batch_path(folder, step).touch()
    (folder / "step-000099.tmp").touch()


@pytest.mark.parametrize("steps", [range(1, 11), range(1, 13), range(7, 11)], ids=str)
def test_batches_for_every_step(load, tmp_path: Path, steps: range):
    keep_batches(tmp_path / "batches", steps)
    load(f"trainer.replay={tmp_path}/batches", "reward=null", "data.train=not_read.jsonl")


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        (range(1, 10), "has no batch for step 10, but trainer.steps is 10"),
        ((1, 2, 4, 10), "has no batch for step 3, but trainer.steps is 10"),
        ((11, 12), "has no batch for step 10, but trainer.steps is 10"),
        ((), "has no batches"),
    ],
    ids=str,
)
def test_too_few_batches(load, tmp_path: Path, steps: Iterable[int], found: str):
    keep_batches(tmp_path / "batches", steps)
    with pytest.raises(ConfigError, match=rf"^trainer\.replay: .*{found}"):
        load(f"trainer.replay={tmp_path}/batches")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("text", [b'{"a": ', b"", b"version https://git-lfs", b"\xff\xfe"], ids=repr)
def test_a_damaged_tokenizer(load, run_file: Path, name: str, text: bytes):
    (run_file.parent / "model" / name).write_bytes(text)
    with pytest.raises(ConfigError, match=rf"^model\.hf_path: .*{name} is not readable as JSON") as caught:
        load()
    assert len(caught.value.problems) == 1


MODULE = """
from json import loads as renamed
import os.path
if os.path:
    def chosen(prompt, response, answer): return 1.0
else:
    chosen = None
first, (second, *rest) = map, (len, max)
def outer():
    def inner(): ...
class Callable_:
    def method(self): ...
"""


@pytest.mark.parametrize(
    ("text", "there", "absent"),
    [
        (
            MODULE,
            ["renamed", "os", "chosen", "first", "second", "outer", "Callable_"],
            ["inner", "method", "json", "map"],
        ),
        ("def __getattr__(name): ...", ["anything"], []),
        ("from json import *", ["anything"], []),
        ("globals()['made'] = len", ["made"], []),
        ("def make():\n    global made\n    made = len\nmake()", ["made"], []),
        ("def broken(: # its own traceback says more", ["broken", "anything"], []),
        ("", [], ["anything"]),
    ],
)
def test_names_of_a_reward_module(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, there: list[str], absent: list[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards").mkdir()
    (tmp_path / "own_rewards" / "module.py").write_text(text)
    for name in there:
        load("reward.type=function", f"reward.path=own_rewards.module:{name}")
    for name in absent:
        with pytest.raises(ConfigError, match=rf"^reward\.path is .*module\.py has no {name}"):
            load("reward.type=function", f"reward.path=own_rewards.module:{name}")
