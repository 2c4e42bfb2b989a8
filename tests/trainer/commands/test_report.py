"""`report` on runs that are done, unfinished, and no runs."""

from pathlib import Path

import pytest

from megatron_a3po.__main__ import main
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
    assert rows["status"] == ["done, 3 steps", "unfinished, step 3 of 3"]
    assert rows["accuracy, before"] == ["0.400", "0.250"]
    assert rows["accuracy, latest"] == ["0.900", "0.500"]
    assert rows["gain"] == ["+0.500", "+0.250"]
    assert rows["wall time"] == ["1 min 30 s", "-"]
    assert rows["reward, last 10 steps"] == ["0.200", "0.200"]
    assert rows["waiting for samples"] == ["25%", "25%"]
    assert rows["actor.lr"] == ["0.0001", "1e-05"]
    assert "trainer.steps" not in rows
    assert "run_dir" not in rows


def test_a_run_that_died_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("trainer:\n  steps: 3\n")
    assert main(["report", str(tmp_path)]) == 0
    assert rows_of(capsys.readouterr().out)["status"] == ["unfinished, step 0 of 3"]
    assert "No step was recorded." in (tmp_path / "report.html").read_text()


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "a", done=True, lr="1e-4")
    assert main(["report", str(run), "--out", str(tmp_path / "pages/a.html")]) == 0
    assert [file.name for file in (tmp_path / "pages").iterdir()] == ["a.html"]
    assert not (run / "report.html").exists()
    assert main(["report", str(run), "--out", str(run / "metrics.jsonl" / "page.html")]) == 2
    assert "name another file with --out" in capsys.readouterr().err


def test_watching_writes_the_page_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")
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
    assert "unfinished, step 3 of 3" in pages[0]
    assert "unfinished, step 5 of 3" in pages[1]
    assert all(reloads in page for page in pages)
    last = (run / "report.html").read_text()
    assert "done, 5 steps" in last
    assert reloads not in last


def test_watching_ends_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "a", done=False, lr="1e-4")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupt)
    assert main(["report", str(run), "--watch"]) == 0


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text("{}")  # an example's folder has one too
    assert main(["report", str(tmp_path), str(tmp_path / "gone")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"{tmp_path} is no run")
    assert said[1].startswith(f"{tmp_path / 'gone'} is not a folder")
