"""Which lines of samples.jsonl the page shows, and what of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_a3po.trainer.report.samples import MOST_TOKENS, SHOWN, samples
from tests.trainer.report.runs import sample_of


def write(run_dir: Path, steps: int, length: int = 2) -> Path:
    run_dir.mkdir()
    rng = np.random.default_rng(1)
    rows = [json.dumps(sample_of(step, rng, length)) for step in range(1, steps + 1)]
    (run_dir / "samples.jsonl").write_text("\n".join(rows) + "\n")
    return run_dir


@pytest.mark.parametrize(
    ("lengths", "shown"), [((3,), 3), ((500,), SHOWN), ((500, 2, 500), 2 * (SHOWN // 3) + 2)]
)
def test_spread_over_each_run_with_its_first_and_its_last(
    tmp_path: Path, lengths: tuple[int, ...], shown: int
):
    found = samples([write(tmp_path / str(run), steps) for run, steps in enumerate(lengths)])
    assert len(found) == shown
    for run, steps in enumerate(lengths):
        of_run = [row["step"] for row in found if row["run"] == run]
        assert of_run == sorted(set(of_run))
        assert (of_run[0], of_run[-1]) == (1, steps)
        assert max(np.diff(of_run)) <= 2 * steps / len(of_run)


def test_the_response_only_and_not_all_of_a_very_long_one(tmp_path: Path):
    (row,) = samples([write(tmp_path / "long", 1, MOST_TOKENS + 10)])
    assert row["num_tokens"] == MOST_TOKENS + 10
    assert {len(row[name]) for name in ("texts", "versions", "logp", "importance_weight", "clipped")} == {
        MOST_TOKENS
    }
    assert row["texts"][0] == "word "
    assert None not in row["importance_weight"]


def test_what_is_no_trajectory_is_passed_over(tmp_path: Path):
    run = write(tmp_path / "torn", 2)
    file = run / "samples.jsonl"
    file.write_text('[1]\n{"step": 1}\n' + file.read_text()[:-20])
    assert [row["step"] for row in samples([run])] == [1]
    assert samples([tmp_path]) == []


@pytest.mark.parametrize(
    "damage",
    [
        {"versions": [-1, None, 0]},
        {"versions": {"0": 1}},
        {"step": "1"},
        {"step": True},
        {"response": None},
        {"reward": "high"},
        {"texts": [1, 2, 3]},
        {"clipped": "no"},
        {"behave_logp": [0.0, {}, []]},
        {"current_version": [3]},
    ],
    ids=str,
)
def test_a_damaged_trajectory_is_passed_over(tmp_path: Path, damage: dict[str, object]):
    run = write(tmp_path / "odd", 1)
    sound = json.loads((run / "samples.jsonl").read_text())
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (sound, sound | damage)))
    assert len(samples([run])) == 1


def test_a_number_without_a_json_form_is_none(tmp_path: Path):
    run = write(tmp_path / "odd", 1)
    row = json.loads((run / "samples.jsonl").read_text()) | {"behave_logp": [0.0, float("nan"), float("inf")]}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert samples([run])[0]["behave_logp"] == [None, None]


def test_samples_without_texts_have_no_colours(tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 1, "response": "yes", "versions": [-1, 0], "tokens": [3, 4]}\n'
    )
    (row,) = samples([tmp_path])
    assert "texts" not in row
    assert row["num_tokens"] == 1
