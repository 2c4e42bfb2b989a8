"""The display on a terminal and without one."""

import io
import logging
import re
from typing import Any

import pytest

from megatron_a3po.config import Config
from megatron_a3po.config.data import DataSection
from megatron_a3po.config.model import ModelSection
from megatron_a3po.config.trainer import TrainerSection
from megatron_a3po.trainer.progress import Display
from tests.trainer.runs import metrics_of

CONFIG = Config(
    run_dir="runs/tiny",
    model=ModelSection(hf_path="model"),
    data=DataSection(train="train.jsonl"),
    trainer=TrainerSection(steps=4),
)
OTHER = logging.getLogger("megatron_a3po.trainer.loop")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def play(display: Display) -> None:
    with display:
        display.plan(["ranks      4 ranks", "forwards   1 for each token"])
        for step in range(1, 51):
            display.warm_start(step, 50, {"loss": 1 / step})
        display.say("accuracy before: 0.400 [not markup]")
        display.step(1, metrics_of(1), 0.4)
        OTHER.warning("something odd")
        display.step(2, metrics_of(2), None)


def test_one_line_a_step(caplog: pytest.LogCaptureFixture):
    file = io.StringIO()
    with caplog.at_level(logging.INFO):
        play(Display(CONFIG, 4, file=file))
    assert file.getvalue() == ""
    speed = "staleness 0.50 (max 2)  50 tokens/s  waiting 25%"
    assert [line for line in caplog.messages if line.startswith("step ")] == [
        f"step 1/4  reward 0.100  accuracy 0.400  loss 0.001  {speed}  ETA 6.0 s",
        f"step 2/4  reward 0.200  accuracy 0.400  loss 0.001  {speed}  ETA 4.0 s",
    ]
    assert sum(line.startswith("warm start") for line in caplog.messages) == 10
    assert caplog.messages[:2] == ["ranks      4 ranks", "forwards   1 for each token"]


def test_live_on_a_terminal(terminal: Terminal, caplog: pytest.LogCaptureFixture):
    spoken = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(spoken)
    try:
        with caplog.at_level(logging.INFO):
            play(Display(CONFIG, 4, file=terminal))
        assert spoken.stream is terminal
        assert not spoken.filters
    finally:
        logging.getLogger().removeHandler(spoken)
    for shown in (
        "4 ranks",
        "runs/tiny",
        "50/50",
        "2/4",
        "accuracy 0.400",
        "[not markup]",
        "waiting 25%",
        "ETA 4.0 s",
    ):
        assert shown in terminal.text
    assert "something odd" in terminal.text
    assert "step 2/4" not in terminal.text  # the display says it
    assert sum(line.startswith("step ") for line in caplog.messages) == 2  # the log file has it


def test_a_failed_run_leaves_the_terminal_as_it_was(terminal: Terminal):
    display = Display(CONFIG, 4, file=terminal)
    with pytest.raises(ZeroDivisionError), display:
        _ = 1 / 0
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_metrics_that_are_missing(caplog: pytest.LogCaptureFixture):
    nothing: dict[str, Any] = {"loss": None, "tokens/trained": 0.0}
    with caplog.at_level(logging.INFO), Display(CONFIG, 4, file=io.StringIO()) as display:
        display.step(1, nothing, None)
    assert caplog.messages == ["step 1/4  "]
