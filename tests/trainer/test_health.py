"""Each health rule on rows that break it and on rows that just do not, and what they are silent about."""

from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.algorithm.metric_table import TABLE
from megatron_a3po.config import Config
from megatron_a3po.config.data import DataSection
from megatron_a3po.config.difference import flat
from megatron_a3po.config.model import ModelSection
from megatron_a3po.config.trainer import TrainerSection
from megatron_a3po.metric_names import APPROXIMATION, UPDATE
from megatron_a3po.trainer import health
from megatron_a3po.trainer.health import FILTERED, MISMATCH, findings

CONFIG = {"trainer.prompts_per_step": 8, "rollout.max_staleness": 4, "actor.bf16": False}
ERROR = f"{APPROXIMATION}/loglinear/importance_weight_abs_error/avg"
LARGEST, SMALLEST = f"{UPDATE}/importance_weight/max", f"{UPDATE}/importance_weight/min"
# cause, metric, a value that breaks the rule, one that does not, the key to turn
CASES = [
    ("mismatch", MISMATCH, 1.1e-3, 0.9e-3, "rollout.engine"),
    ("approximation loglinear", ERROR, 0.011, 0.009, "rollout.max_staleness"),
    ("large importance weight", LARGEST, 20.1, 19.9, "actor.lr"),
    ("small importance weight", SMALLEST, 0.049, 0.051, "actor.num_mini_batches"),
    ("staleness", "staleness/max", 11.0, 10.0, "rollout.max_staleness"),
    ("no signal", FILTERED, 73.0, 72.0, "rollout.samples_per_prompt"),
    ("no signal", "grad_norm", 0.0, 1e-9, "data.train"),
]


def rows_of(name: str, values: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": step, name: value} for step, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("cause", "metric", "bad", "good", "key"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES]
)
def test_one_sentence_once_with_the_key_to_turn(cause: str, metric: str, bad: float, good: float, key: str):
    (found,) = findings(rows_of(metric, [good, *[bad] * 12, good, *[bad] * 12]), CONFIG)
    assert found.cause == cause
    assert key in found.sentence
    assert "\n" not in found.sentence
    assert findings(rows_of(metric, [good] * 20), CONFIG) == []


def test_one_odd_row_is_no_illness_and_rows_without_the_number_do_not_count():
    bad, good = 50.0, 1.0
    assert findings(rows_of(LARGEST, [bad, bad, good, bad, bad, None, good]), CONFIG) == []
    (found,) = findings(rows_of(LARGEST, [bad, None, float("nan"), bad, None, bad]), CONFIG)
    assert found.step == 6


def test_entropy_is_measured_against_where_the_run_came_from():
    name = f"{UPDATE}/entropy/avg"
    first = [0.3, 0.32, 0.28, 5.0, 0.3]  # their median is 0.3
    assert findings(rows_of(name, [*first, *[0.031] * 9]), CONFIG) == []
    (found,) = findings(rows_of(name, [*first, *[0.029] * 9]), CONFIG)
    assert (found.cause, found.step) == ("entropy", 8)
    assert "0.029" in found.sentence
    assert "actor.entropy_coef" in found.sentence
    assert findings(rows_of(name, [0.001] * 20), CONFIG) == []  # it was never higher


def test_bf16_may_disagree_more():
    assert findings(rows_of(MISMATCH, [0.04] * 5), {**CONFIG, "actor.bf16": True}) == []
    (found,) = findings(rows_of(MISMATCH, [0.06] * 5), {**CONFIG, "actor.bf16": True})
    assert "actor.bf16=false" in found.sentence


def test_fixed_staleness_is_the_key_where_it_decides():
    (found,) = findings(rows_of("staleness/max", [16.0]), {**CONFIG, "rollout.fixed_staleness": 16})
    assert found.sentence.endswith("lower rollout.fixed_staleness")


def test_a_policy_that_moves_fast_for_a_while_is_no_bad_approximation():
    """The rows of a real start: four mini-batches at a learning rate of 1e-4, staleness 1 to 2."""
    start = [
        0.0,
        0.0039,
        0.0306,
        0.0273,
        0.0198,
        0.0194,
        0.0131,
        0.0099,
        0.0099,
        0.0068,
        0.0081,
        0.0063,
        0.0061,
    ]
    assert findings(rows_of(ERROR, [*start, 0.0038]), CONFIG) == []
    (found,) = findings(rows_of(ERROR, [0.03] * 10), CONFIG)
    assert (found.cause, found.step) == ("approximation loglinear", 10)


def test_the_relative_error_is_no_alarm():
    assert findings(rows_of(f"{APPROXIMATION}/loglinear/rel_error/avg", [1e6] * 9), CONFIG) == []


def test_metrics_and_keys_exist():
    config = Config(
        run_dir="runs/tiny",
        model=ModelSection(hf_path="model"),
        data=DataSection(train="train.jsonl"),
        trainer=TrainerSection(steps=4),
    )
    names = {metric.name for metric in TABLE}
    asked: set[str] = set()

    class Asked(dict):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return default

    health.Health(CONFIG).see(Asked(step=1))
    assert asked <= names
    assert len(asked) == 9
    page = (Path(__file__).parents[2] / "docs/report.md").read_text()
    assert all(f"| {rule.cause} |" in page for rule in health.rules(CONFIG))
    keys = flat(config.model_dump(mode="json"))
    for rule in health.rules(CONFIG):
        named = [
            word.strip(",:().")
            for word in rule.sentence.split()
            if word.startswith(("actor.", "rollout.", "data."))
        ]
        assert named
        assert {name.partition("=")[0] for name in named} <= keys.keys()
