"""`report` on runs that are done, unfinished, and no runs."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_a3po.__main__ import main
from megatron_a3po.trainer.attempt import lock
from megatron_a3po.trainer.commands import report
from megatron_a3po.trainer.summary import summarize, write_summary
from tests.trainer.runs import record_steps


def make_run(run_dir: Path, *, done: bool, lr: str) -> Path:
    for steps, version, accuracy in ((range(1, 3), 0, 0.25), (range(3, 4), 2, 0.5)):
        record_steps(run_dir, steps, **{"evaluation/version": version, "evaluation/accuracy": accuracy})
    (run_dir / "config.yaml").write_text(f"run_dir: {run_dir}\nactor:\n  lr: {lr}\ntrainer:\n  steps: 3\n")
    if done:
        accuracies = {"accuracy_before": 0.4, "accuracy_after": 0.9}
        more = {"export": None, "wall_seconds": 90.0, "multi_version_fraction": 0.5}
        write_summary(run_dir, summarize(run_dir, status="done", **accuracies, **more))
    return run_dir


def rows_of(text: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line
    ]
    return {name: values for name, *values in cells}


def test_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [make_run(tmp_path / "a", done=True, lr="1e-4"), make_run(tmp_path / "b", done=False, lr="1e-5")]
    assert main(["report", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"page: {tmp_path / 'report.html'}\n")
    assert "2 runs" in (tmp_path / "report.html").read_text()
    rows = rows_of(said)
    assert rows["status"] == ["done, 3 steps", "stopped or crashed, step 3 of 3"]
    assert rows["accuracy, before"] == ["0.400", "0.250"]
    assert rows["accuracy, latest"] == ["0.900", "0.500"]
    assert rows["gain"] == ["+0.500", "+0.250"]
    assert rows["wall time"] == ["1 min 30 s in all", "6.0 s in its steps so far"]
    assert rows["reward, last 10 steps"] == ["0.200", "0.200"]
    assert rows["waiting for samples"] == ["25%", "25%"]
    assert rows["actor.lr"] == ["0.0001", "1e-05"]
    assert "trainer.steps" not in rows
    assert "run_dir" not in rows


def test_a_run_that_died_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("trainer:\n  steps: 3\n")
    assert main(["report", str(tmp_path)]) == 0
    assert rows_of(capsys.readouterr().out)["status"] == ["stopped or crashed, step 0 of 3"]
    assert "No step was recorded." in (tmp_path / "report.html").read_text()


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "a", done=True, lr="1e-4")
    assert main(["report", str(run), "--out", str(tmp_path / "pages/a.html")]) == 0
    assert [file.name for file in (tmp_path / "pages").iterdir()] == ["a.html"]
    assert not (run / "report.html").exists()
    assert main(["report", str(run), "--out", str(run / "metrics.jsonl" / "page.html")]) == 2
    assert "name another file with --out" in capsys.readouterr().err


LOG = "2026-01-01 10:00:00,{ms} {of} step 3 {level} megatron_a3po.trainer.worker: {text}\n"
FAILED = "rank 0 failed:\nTraceback (most recent call last):\n  File ...\nRuntimeError: no <memory>"


def test_a_crashed_run_shows_its_last_error(tmp_path: Path):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")
    (run / "logs").mkdir()
    for name, ms, level, text in (
        ("rank-1", "200", "CRITICAL", "rank 1 failed:\nRuntimeError: peer"),
        ("rank-0", "300", "CRITICAL", FAILED),
        ("rollout", "400", "INFO", "stopped"),
    ):
        early = LOG.format(ms="100", of=name, level="ERROR", text="of an earlier attempt")
        (run / f"logs/{name}.log").write_text(early + LOG.format(ms=ms, of=name, level=level, text=text))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "rank-0: rank 0 failed: RuntimeError: no &lt;memory&gt;" in page
    assert "6.0 s in its steps so far" in page
    with ExitStack() as held:
        lock(run, held)
        assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "running, step 3 of 3" in page
    assert "Last error" not in page


def test_a_fatal_signal_is_an_error_too(tmp_path: Path):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")
    (run / "logs").mkdir()
    last = LOG.format(ms="100", of="rank-0", level="INFO", text="step 3/3")
    (run / "logs/rank-0.log").write_text(
        last + "Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File\n"
    )
    assert main(["report", str(run)]) == 0
    assert "rank-0: Fatal Python error: Segmentation fault" in (run / "report.html").read_text()


@pytest.mark.parametrize("summary", ["{}", "[]", "null", '{"status": "done"}', '{"status": 1, "steps": 2}'])
def test_a_summary_that_is_none(tmp_path: Path, summary: str, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")
    (run / "summary.json").write_text(summary)
    assert main(["report", str(run)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{run / 'summary.json'} is no summary")


@pytest.mark.parametrize("value", [None, "3", [3], {"0": 1}, True, 1.5])
def test_a_row_without_a_step_is_none(tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "a", done=True, lr="1e-4")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": value, "loss": 1.0}) + "\n")
    assert main(["report", str(run)]) == 0
    assert rows_of(capsys.readouterr().out)["reward, last 10 steps"] == ["0.200"]


def test_watching_ends_where_a_run_has_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its lock is free and there is no summary."""
    run = make_run(tmp_path / "a", done=False, lr="1e-4")
    held, pages = ExitStack(), []
    lock(run, held)

    def a_while(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        held.close()

    monkeypatch.setattr(report.time, "sleep", a_while)
    assert main(["report", str(run), "--watch"]) == 0
    assert ["running, step 3 of 3" in page for page in pages] == [True]
    last = (run / "report.html").read_text()
    assert "stopped or crashed, step 3 of 3" in last
    assert 'http-equiv="refresh"' not in last


def test_watching_writes_the_page_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")
    held = ExitStack()
    lock(run, held)
    pages = []

    def a_while(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        assert len(pages) < 3
        if len(pages) == 1:
            record_steps(run, range(4, 6))
        else:
            make_run(run, done=True, lr="1e-4")

    monkeypatch.setattr(report.time, "sleep", a_while)
    assert main(["report", str(run), "--watch"]) == 0
    reloads = '<meta http-equiv="refresh" content="10">'
    assert "running, step 3 of 3" in pages[0]
    assert "running, step 5 of 3" in pages[1]
    assert all(reloads in page for page in pages)
    last = (run / "report.html").read_text()
    assert "done, 5 steps" in last
    assert reloads not in last
    held.close()


def test_watching_ends_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupt)
    with ExitStack() as held:
        lock(run, held)
        assert main(["report", str(run), "--watch"]) == 0


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text("{}")  # an example's folder has one too
    assert main(["report", str(tmp_path), str(tmp_path / "gone")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"{tmp_path} is no run")
    assert said[1].startswith(f"{tmp_path / 'gone'} is not a folder")
