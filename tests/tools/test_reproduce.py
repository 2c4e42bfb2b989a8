"""The experiment at a toy size: stopped, continued, and what it writes. And its figures on rows made by hand."""

import csv
import importlib
import json
import shutil
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_a3po.config import load_config
from megatron_a3po.errors import ConfigError, InputError
from tests.run_files import write_rows
from tests.trainer.command import ROOT, Command, spawn
from tests.trainer.replay import write_tiny_model

STEPS = 3
METHODS, STALENESS = ("loglinear", "recompute"), (0, 1)


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """The tools import each other as programs in one folder do."""
    sys.path.append(str(ROOT / "tools"))


def write_task(folder: Path) -> Path:
    """A model, sums to do and a configuration with a warm start."""
    write_tiny_model(folder / "model")
    sums = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(9) for j in range(9)]
    sums = [{**row, "response": f"{row['answer']} :{row['answer']}"} for row in sums]
    write_rows(folder / "train.jsonl", sums[:-8])
    write_rows(folder / "held_out.jsonl", sums[-8:])
    sections = {
        "model": {"hf_path": f"{folder}/model"},
        "data": {
            "train": f"{folder}/train.jsonl",
            "held_out": f"{folder}/held_out.jsonl",
            "max_prompt_tokens": 16,
        },
        "reward": {"type": "function", "path": "tests.trainer.rewards:any_response"},
        "warm_start": {"steps": 2, "batch_size": 4, "lr_warmup_iters": 1},
        "actor": {"lr": 1e-3, "lr_warmup_iters": 2, "max_tokens_per_micro_batch": 512},
        "rollout": {"samples_per_prompt": 2, "max_response_tokens": 12},
        "trainer": {"steps": 50, "prompts_per_step": 4},
    }
    config = folder / "task.yaml"
    config.write_text(yaml.safe_dump(sections))
    return config


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods at two staleness with one seed, stopped in the second run and continued."""
    folder = tmp_path_factory.mktemp("reproduce")
    config = write_task(folder)
    out = folder / "out"

    def start(*more: str) -> Command:
        argv = [str(config), "--out", str(out), "--seeds", "1", "--steps", str(STEPS), *more]
        return spawn(folder, *argv, program=("tools/reproduce.py",))

    grid = ["--methods", *METHODS, "--staleness", *map(str, STALENESS), "--mini-batches", "2"]
    first, second = (out / "cells" / f"{method}-d0-m2-s1" for method in METHODS)
    running = start(*grid)
    running.wait_for(lambda: (second / "cell.json").is_file())
    running.signal(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code == 75, stopped.output
    assert "stopped in recompute-d0-m2-s1" in stopped.output
    assert stopped.output.rstrip().endswith("stopped: the same command goes on from here")
    kept = {path: path.read_bytes() for path in (first / "metrics.jsonl", out / "start/metrics.jsonl")}
    ended = start(*grid).wait()
    assert ended.code == 0, ended.output
    assert f"{out / 'cells' / 'metrics-d1-m2-s1'}" not in ended.output  # a run speaks into its log
    assert {path: path.read_bytes() for path in kept} == kept  # done is not done again
    return out


def test_every_cell_ran_as_it_says(out: Path) -> None:
    wanted = {f"{method}-d{d}-m2-s1" for method in (*METHODS, "metrics") for d in STALENESS}
    assert {path.name for path in (out / "cells").iterdir()} == wanted | {"forced-d1-m2-s1"}
    for directory in (out / "cells").iterdir():
        config = yaml.safe_load((directory / "config.yaml").read_text())
        assert config["model"]["hf_path"] == str(out / "start/reference")
        assert config["warm_start"] is None
        assert (
            f"d{config['rollout']['fixed_staleness']}-m{config['actor']['num_mini_batches']}"
            in directory.name
        )
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        staleness = config["rollout"]["fixed_staleness"]
        assert [row["staleness/max"] for row in rows[-STEPS:]] == [min(v, staleness) for v in range(STEPS)]


def test_the_tables_and_the_rows_are_those_of_the_runs(out: Path) -> None:
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())}
    assert len(rows) == 7
    table = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert {row["name"] for row in table} == set(rows)
    # One checkpoint for all: the first step's samples are of the same weights, whatever the method.
    assert len({row["accuracy_before"] for row in rows.values()}) == 1
    assert rows["loglinear-d1-m2-s1"]["forwards_per_token"] == 1
    assert 1.2 < rows["recompute-d1-m2-s1"]["forwards_per_token"] < 1.8
    assert rows["forced-d1-m2-s1"]["forwards_per_token"] == 2
    # Forced recompute trains as recompute does, and so does `metrics`.
    for name in ("reward", "accuracy", "entropy", "importance_weight_max", "clipped_tokens"):
        found = {rows[f"{method}-d1-m2-s1"][name] for method in ("recompute", "forced", "metrics")}
        assert len(found) == 1, name
    errors = rows["metrics-d1-m2-s1"]
    assert errors["loglinear/abs_error"] == errors["rollout/abs_error"] > 0  # the three are one at d = 1
    assert "loglinear/abs_error" not in rows["loglinear-d1-m2-s1"]

    text = (out / "results.md").read_text()
    for title in ("Learning", "Trust region", "Time"):
        assert f"## {title}, 2 mini-batches" in text
    assert "## Approximation errors" in text
    assert text.count("    tools/reproduce.py ") == 1  # the command of both calls
    assert "| 1 | forced recompute | 1 |" in text
    assert text.count("*published: recompute*") == 3
    assert (out / "report.html").is_file()
    for plot in ("curves-m2", "errors"):
        assert f"]({plot}.png)" in text
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_grid_is_what_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked_for()
    assert len(found) == len({cell.name for cell in found}) == 4 * 3 * 3 + 3 + 1
    assert {cell.steps for cell in found} == {60}
    assert {cell.lr_warmup_iters for cell in found} == {40}
    assert [cell.seed for cell in found[:-1]] == sorted(cell.seed for cell in found[:-1])
    assert {(cell.method, cell.seed) for cell in found if cell.method in ("metrics", "forced")} == {
        ("metrics", 1),
        ("forced", 1),
    }
    gain = asked_for("--asynchronous", "--steps", "20")
    assert len({cell.name for cell in gain}) == 3 * (1 + 4 * 3)
    assert "rollout.max_staleness=0" in gain[0].overrides()
    assert all("rollout.filter_no_signal=false" in cell.overrides() for cell in gain)
    assert len({cell.name for cell in asked_for("--asynchronous", "--seeds", "7")}) == 1 + 4 * 3


def asked_for(*arguments: str) -> list[Any]:
    reproduce = importlib.import_module("reproduce")
    config = str(ROOT / "examples/reproduce/config.yaml")
    parsed = reproduce._arguments([config, "--out", "nowhere", *arguments])
    return reproduce.planned(parsed, load_config(config, check_files=False))


def test_the_whole_grid_warms_up_for_as_many_steps_everywhere() -> None:
    found = asked_for("--full")
    assert len(found) == len({cell.name for cell in found}) == 293
    assert {(cell.mini_batches, cell.lr_warmup_iters) for cell in found} == {(1, 10), (4, 40)}
    assert "actor.lr_warmup_iters=10" in next(cell for cell in found if cell.mini_batches == 1).overrides()


@pytest.mark.parametrize(
    "more", [["--methods", "linear"], ["--staleness", "2"], ["--mini-batches", "1", "4"]]
)
def test_what_the_asynchronous_gain_would_drop_is_refused(more: list[str]) -> None:
    with pytest.raises(InputError, match=f"leave out .*{more[0]}, or ask for that in a call of its own"):
        asked_for("--asynchronous", *more)


def test_a_cell_that_cannot_be_is_refused_before_any_runs(out: Path) -> None:
    cells, reproduce = importlib.import_module("reproduce_cells"), importlib.import_module("reproduce")
    config = str(out.parent / "task.yaml")
    fits = cells.Cell("loglinear", "fixed", 1, 2, 1, STEPS)
    reproduce.refuse_unfit(config, [fits])
    with pytest.raises(
        ConfigError, match=r"loglinear-d1-m1-s1: actor\.lr_warmup_iters is 2, but must be less"
    ):
        reproduce.refuse_unfit(config, [fits, cells.Cell("loglinear", "fixed", 1, 1, 1, 2)])


def test_a_run_of_another_task_or_length_is_not_taken_for_this_one(out: Path, tmp_path: Path) -> None:
    cells, reproduce = importlib.import_module("reproduce_cells"), importlib.import_module("reproduce")
    config = out.parent / "task.yaml"
    asked = Namespace(config=str(config), out=out)
    there = cells.Cell("loglinear", "fixed", 1, 2, 1, STEPS, lr_warmup_iters=4)
    reproduce.refuse_others(asked, [there, cells.Cell("loglinear", "fixed", 3, 2, 1, STEPS + 1)])
    with pytest.raises(InputError, match=r"loglinear-d1-m2-s1 is a run with another trainer\.steps: give"):
        reproduce.refuse_others(asked, [replace(there, steps=STEPS + 1)])
    asked.config = str(tmp_path / "other.yaml")
    Path(asked.config).write_text(config.read_text().replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(InputError, match=r"another actor\.lr: give another --out"):
        reproduce.refuse_others(asked, [there])
    Path(asked.config).write_text(config.read_text().replace("steps: 2\n", "steps: 3\n"))
    with pytest.raises(
        InputError, match=r"start is a run with another warm_start\.steps: give another --out"
    ):
        reproduce.refuse_others(asked, [there])


def test_a_plot_has_a_point_for_each_step_of_a_short_run() -> None:
    plots = importlib.import_module("reproduce_plots")
    axis = plots.pyplot.subplots()[1]
    for steps, points in ((1, 1), (3, 3), (60, 56)):
        plots._line(axis, [[{"x": float(step)} for step in range(steps)]], "x", "black", "")
        line = axis.lines[-1]
        assert len(line.get_xdata()) == points
        assert (line.get_marker() == ".") == (steps < 20)
    plots.pyplot.close("all")


def test_a_number_that_a_step_has_not_costs_no_table(out: Path, tmp_path: Path) -> None:
    results = importlib.import_module("reproduce_results")
    folder = tmp_path / "out"
    shutil.copytree(out / "cells", folder / "cells", ignore=shutil.ignore_patterns("export", "checkpoints"))
    file = folder / "cells" / "loglinear-d1-m2-s1" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    largest = "ppo_actor/update/importance_weight/max"
    assert rows[1][largest] is not None
    for row in rows:
        row |= {largest: None, "ppo_actor/update/clip_ratio": None, "time/step": None}
        row.pop("rollout/idle_s", None)
    write_rows(file, rows)
    found, whole = (
        next(row for row in results.read_results(one) if row["name"] == file.parent.name)
        for one in (folder, out)
    )
    assert found.keys() == whole.keys()
    missing = {"importance_weight_largest", "clip_ratio", "step_s", "trainer_idle", "generator_idle"}
    assert missing <= {name for name, value in found.items() if value is None}
    assert not missing & {name for name, value in whole.items() if value is None}
    rows = results.read_results(folder)
    tables = dict(importlib.import_module("reproduce_tables").tables(rows))
    assert "| 1 | loglinear | 1 |" in tables["Time, 2 mini-batches"]
    assert results.program_rows(rows)
    assert importlib.import_module("reproduce_plots").draw(rows, folder / "cells", folder)


def row_by_hand(**changes: Any) -> dict[str, Any]:
    cell = {"method": "loglinear", "mode": "fixed", "staleness": 8, "mini_batches": 4, "seed": 1, "steps": 60}
    cell |= {"policy": "wait", "gain": False}
    return {**cell, "name": "x", "step_s": 1.0, "wait_for_samples_s": 0.2, "proximal_pass_s": 0.0,
            "forward_backward_s": 0.5, "optimizer_s": 0.1, "clip_ratio": 0.01, "trainer_idle": 0.2,
            "generator_idle": 0.5, **changes}  # fmt: skip


def test_mean_and_spread_over_seeds_and_the_published_figures() -> None:
    tables = importlib.import_module("reproduce_tables")
    rows = [row_by_hand(seed=seed, reward=reward) for seed, reward in ((1, 0.4), (2, 0.5), (3, 0.6))]
    found = dict(tables.tables(rows))
    lines = found["Learning, 4 mini-batches"].splitlines()
    assert lines[2].startswith("| 8 | loglinear | 3 | 0.500 ± 0.100 |")
    assert lines[3].startswith("| 8 | *published: loglinear* |  | 0.937 | 0.799 | 0.084 |")
    time = found["Time, 4 mini-batches"].splitlines()[2]
    assert time.endswith("| 0.200 ± 0.000 | 0.200 ± 0.000 |  |")  # waiting, the rest: 1 - 0.5 - 0.1 - 0.2


def test_the_asynchronous_gain_is_against_the_synchronous_run() -> None:
    tables = importlib.import_module("reproduce_tables")
    synchronous = row_by_hand(gain=True, mode="bound", staleness=0, samples_s=30.0)
    asynchronous = row_by_hand(gain=True, mode="bound", staleness=2, policy="drop", samples_s=20.0)
    lines = dict(tables.tables([asynchronous, synchronous]))["Asynchronous gain"].splitlines()
    assert lines[2].startswith("| synchronous |  | 30.0 | 1.00 | 20 | 50 |")
    assert lines[3].startswith("| bound 2 | drop | 20.0 | 1.50 | 20 | 50 |")
    # Seed against seed: a slow day of one is none of the other's.
    rows = [synchronous, asynchronous, {**synchronous, "seed": 2, "samples_s": 60.0}]
    lines = dict(tables.tables([*rows, {**asynchronous, "seed": 2, "samples_s": 40.0}]))["Asynchronous gain"]
    assert "| bound 2 | drop | 30.0 ± 14.1 | 1.50 ± 0.00 |" in lines


def test_the_page_of_results_is_that_of_its_rows() -> None:
    tables = importlib.import_module("reproduce_tables")
    page = (ROOT / "docs/results.md").read_text()
    for title, table in tables.tables(json.loads((ROOT / "docs/results/results.json").read_text())):
        assert table in page, title


def test_programs_get_the_time_of_a_step_against_loglinear() -> None:
    results = importlib.import_module("reproduce_results")
    rows = [row_by_hand(seed=1, step_s=1.0), row_by_hand(seed=2, step_s=3.0, peak_mb=500.0)]
    rows += [row_by_hand(method="recompute", step_s=2.5), row_by_hand(method="linear", staleness=2)]
    assert results.program_rows(rows) == [
        {"case": "4 mini-batches, staleness 8", "implementation": "loglinear", "seconds": 2.0, "ratio": 1.0,
         "peak_mb": 500.0},
        {"case": "4 mini-batches, staleness 8", "implementation": "recompute", "seconds": 2.5, "ratio": 1.25,
         "peak_mb": None},
        {"case": "4 mini-batches, staleness 2", "implementation": "linear", "seconds": 1.0, "ratio": None,
         "peak_mb": None},
    ]  # fmt: skip
