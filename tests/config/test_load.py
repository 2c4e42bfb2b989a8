"""Reading, merging, typing: what comes out of a file and its overrides."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_a3po.config import load_config, to_yaml
from megatron_a3po.config.config import Config
from megatron_a3po.config.difference import differing_keys
from megatron_a3po.config.keys import closest_key, dotted_keys
from megatron_a3po.config.reward import FunctionReward
from megatron_a3po.config.validate import validate
from megatron_a3po.errors import ConfigError


def test_a_small_rate_is_a_number(run_file: Path, load):
    run_file.write_text(run_file.read_text() + "actor:\n  lr: 1e-6\n")
    assert yaml.safe_load("lr: 1e-6") == {"lr": "1e-6"}, "the reason for OmegaConf"
    assert load().actor.lr == 1e-6
    assert load("actor.lr=3e-5").actor.lr == 3e-5
    assert load("actor.lr=1").actor.lr == 1.0


def test_an_unquoted_off_is_the_choice_of_that_name(run_file: Path, load):
    run_file.write_text(run_file.read_text() + "actor:\n  behave_weight: off\n")
    assert load("rollout.max_staleness=0").actor.behave_weight == "off"
    with pytest.raises(ConfigError, match=r"actor\.behave_weight is true"):
        load("actor.behave_weight=on")


def test_overrides_win_in_order(load):
    assert load("trainer.steps=3", "trainer.steps=4").trainer.steps == 4


def test_an_optional_section_comes_and_goes(load):
    assert load().warm_start is None
    assert load("warm_start.steps=20").warm_start.lr_warmup_iters == 10
    assert load("warm_start.steps=20", "warm_start=null").warm_start is None


def test_another_member_of_a_union(load):
    config = load("reward={type: function, path: 'json:loads'}")
    assert isinstance(config.reward, FunctionReward)
    assert config.reward.timeout_s == 10.0


@pytest.mark.parametrize(
    ("name", "run_dir"), [("gsm8k.yaml", "runs/gsm8k"), ("quick/config.yaml", "runs/quick")]
)
def test_the_run_directory_is_named_after_the_file(run_file: Path, name: str, run_dir: str):
    file = run_file.parent / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(run_file.read_text())
    assert load_config(file).run_dir == run_dir
    assert load_config(file, ["run_dir=elsewhere"]).run_dir == "elsewhere"


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path, load):
    config = load("actor.lr=1e-6", "warm_start.steps=20", "run_dir='1e5'", "trainer.wandb.project=mine")
    assert config.run_dir == "1e5"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run") == config
    assert set(dotted_keys(Config)) - {"reward.path"} == all_keys(yaml.safe_load(to_yaml(config)))


def all_keys(tree: dict, prefix: str = "") -> set[str]:
    below = [all_keys(value, f"{prefix}{key}.") for key, value in tree.items() if isinstance(value, dict)]
    return {prefix + key for key in tree}.union(*below)


def test_differing_keys(tmp_path: Path, load):
    file = tmp_path / "old.yaml"
    file.write_text(to_yaml(load()))
    assert differing_keys(file, load("run_dir=elsewhere")) == []
    assert differing_keys(file, load("actor.lr=1", "trainer.steps=3")) == ["actor.lr", "trainer.steps"]
    assert set(differing_keys(file, load("warm_start.steps=20"))) >= {"warm_start", "warm_start.steps"}
    file.write_text(to_yaml(load()).replace("  seed: 1", "  old_key: 1"))
    assert differing_keys(file, load()) == ["trainer.seed", "trainer.old_key"]
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="is not readable"):
        differing_keys(file, load())


def test_frozen_and_picklable(load):
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.trainer.steps = 5
    assert pickle.loads(pickle.dumps(config)) == config


def test_files_need_not_be_there_when_not_asked(load):
    assert load("data.train=nowhere", check_files=False).data.train == "nowhere"


def test_imports_no_torch_and_little_else():
    heavy = ("torch", "numpy", "transformers", "megatron")
    code = f"import sys, megatron_a3po.config; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_mistake_is_told_once_and_raises_no_echo(load):
    """A mistyped parallel size leaves its default behind; what that default would break is not told."""
    with pytest.raises(ConfigError) as caught:
        load("actor.tensor_model_paralel_size=2", "actor.sequence_parallel=true")
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError) as caught:
        load("trainer.prompts_per_step=many", "actor.num_mini_batches=5")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("actor.tensor_model_parallel", "actor.tensor_model_parallel_size"),
        ("rollout.max_stalenes", "rollout.max_staleness"),
        ("max_staleness", "rollout.max_staleness"),
        ("trainer.num_mini_batches", "actor.num_mini_batches"),
        ("trainr", "trainer"),
        ("trainer.stps", "trainer.steps"),
        ("model.xyzzy", None),
    ],
)
def test_did_you_mean(unknown: str, meant: str | None):
    assert closest_key(unknown, Config) == meant


TEXT = st.text("aoff1.$", max_size=3)
KEYS = st.sampled_from(sorted({key.rpartition(".")[2] for key in dotted_keys(Config)})) | TEXT
VALUES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | TEXT
TREES = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(KEYS, VALUES | st.just({}), max_size=4)
SECTIONS = st.sampled_from(list(Config.model_fields))


@given(st.dictionaries(SECTIONS, TREES, max_size=9))
def test_whatever_is_written_is_answered_in_sentences(raw: dict):
    config, problems = validate({"run_dir": "run"} | raw)
    assert config is not None or problems
    for problem in problems:
        assert "\n" not in problem.sentence
        assert problem.sentence.endswith((".", "?", "=..."))
