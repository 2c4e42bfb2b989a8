"""Rank 0's account of a run: what it warns of, and that it warns once, restarts included."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_a3po.config import Config
from megatron_a3po.config.data import DataSection
from megatron_a3po.config.model import ModelSection
from megatron_a3po.config.trainer import TrainerSection
from megatron_a3po.trainer.journal import Journal
from megatron_a3po.trainer.report.past import read_past
from megatron_a3po.trainer.shown import Shown
from tests.trainer.runs import metrics_of


class NoTokens:
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return ""


def test_a_health_rule_speaks_once_in_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = Config(
        run_dir=str(tmp_path),
        model=ModelSection(hf_path="model"),
        data=DataSection(train="train.jsonl"),
        trainer=TrainerSection(steps=9),
    )
    for attempt, steps in ((1, range(1, 4)), (2, range(3, 6))):
        with Journal(config, attempt, NoTokens()) as journal, caplog.at_level(logging.WARNING):
            for step in steps:
                stale = {"staleness/max": 11.0} if step > 1 else {}
                journal.step(step, step - 1, Shown([]), metrics_of(step, **stale))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "11 versions old" in record.getMessage()
    assert "rollout.max_staleness" in record.getMessage()


def test_groups_that_are_all_filtered_are_told_of_without_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Ten steps' worth of them, once in a run; a report of the run has it too."""
    config = Config(
        run_dir=str(tmp_path),
        model=ModelSection(hf_path="model"),
        data=DataSection(train="train.jsonl"),
        trainer=TrainerSection(steps=9, prompts_per_step=8),
    )
    for attempt in (1, 2):
        with Journal(config, attempt, NoTokens()) as journal, caplog.at_level(logging.WARNING):
            journal.wait(1, 79)
            assert len(caplog.records) == attempt - 1
            for num_filtered in (80, 81):
                journal.wait(1, num_filtered)
    (record,) = caplog.records
    assert "choose prompts of another difficulty (data.train)" in record.getMessage()
    (found,) = read_past(tmp_path).findings
    assert (found.cause, found.step, found.sentence) == ("no signal", 1, record.getMessage())
