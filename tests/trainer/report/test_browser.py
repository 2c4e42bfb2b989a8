"""The page in a real browser: it opens, quickly, without a word on the console, and its figures are there."""

import json
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from megatron_a3po.trainer.report.page import page
from megatron_a3po.trainer.report.past import read_past
from tests.browser import Opened, open_page
from tests.trainer.report.runs import sample_of, write_run

MOST_BYTES = 5_000_000
OPENS_S = 3.0
WIDER = "document.documentElement.dataset.wider = document.documentElement.scrollWidth - innerWidth;"
# How many pixels of each canvas have been painted on, the least of all.
PAINTED = """
const inked = pixels => pixels.data.filter((value, index) => index % 4 == 3 && value).length;
const painted = [...document.querySelectorAll('canvas')].map(canvas =>
  inked(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)));
document.documentElement.dataset.painted = Math.min(...painted);
"""
PAPER = "document.documentElement.dataset.paper = getComputedStyle(document.body).backgroundColor;"
BUSY = "let sum = 0; for (let i = 0; i < 1.5e9; i++) sum = (sum * 31 + i) % 1000003;"
ALL_FIGURES = 19


def written(*run_dirs: Path) -> Path:
    file = run_dirs[0].parent / "page.html"
    file.write_text(page([read_past(run_dir) for run_dir in run_dirs]), encoding="utf-8")
    assert file.stat().st_size < MOST_BYTES
    return file


def titles(opened: Opened) -> list[str]:
    return [part.partition("<")[0] for part in opened.document.split("<h3>")[1:]]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(write_run(tmp_path_factory.mktemp("long") / "run", 10_000))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_ten_thousand_steps(long_run: Path, width: int, dark: bool):
    opened = open_page(long_run, width=width, dark=dark, then=WIDER + PAINTED + PAPER)
    assert not opened.console
    assert opened.noted("paper") == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert opened.cpu_s < OPENS_S
    assert len(titles(opened)) == opened.document.count("<canvas") == ALL_FIGURES
    assert int(opened.noted("wider")) <= 0
    assert int(opened.noted("painted")) > 100


def test_an_error_and_slowness_would_be_seen(tmp_path: Path):
    (tmp_path / "page.html").write_text("<!doctype html><body></body>")
    idle = open_page(tmp_path / "page.html", then="true")
    opened = open_page(tmp_path / "page.html", then=f"{BUSY} throw new Error('no ' + sum)")
    assert "Uncaught Error: no " in opened.console[0]
    assert opened.cpu_s > idle.cpu_s + 0.3  # a second, on a machine that is not the fastest


# Every text on a canvas: what it says, and how much of it lies left of the edge.
WRITTEN = """
const texts = window.texts = [];
const write = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  texts.push([text, this.getTransform().e + x - this.measureText(text).actualBoundingBoxLeft]);
  write.call(this, text, x, y);
};
"""
NOTED = "document.documentElement.dataset.texts = encodeURIComponent(JSON.stringify(window.texts));"


def test_the_numbers_of_an_axis_are_whole_and_tell_its_lines_apart(tmp_path: Path):
    run = write_run(tmp_path / "small", 6)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        share = row["step"] / 6
        row |= {"loss": -5e-4 * share, "reward/avg": -2e-5 * share, "grad_norm": 1 + 3e-4 * share}
        row |= {"ppo_actor/update/entropy/avg": 1e9 * share, "forwards_per_token": -1234.5 * share}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_page(written(run), first=WRITTEN, then=NOTED)
    assert not opened.console
    texts = json.loads(unquote(opened.noted("texts")))
    assert min(left for _, left in texts) >= 0
    said = {text for text, _ in texts}
    assert {"-5e-4", "-2e-5", "1e+9", "-1000"} <= said
    assert {"1.0001", "1.0002"} <= said  # and not 1 beside 1


def test_one_step(tmp_path: Path):
    opened = open_page(written(write_run(tmp_path / "short", 1)), then=PAINTED)
    assert not opened.console
    assert len(titles(opened)) == ALL_FIGURES
    assert int(opened.noted("painted")) > 100


def test_a_crashed_run_and_one_that_recorded_nothing(tmp_path: Path):
    run = write_run(tmp_path / "crashed", 7)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).write_bytes((run / name).read_bytes()[:-30])
    opened = open_page(written(run))
    assert not opened.console
    assert "stopped or crashed, step 6 of 10000" in opened.document
    assert len(titles(opened)) == ALL_FIGURES
    (run / "metrics.jsonl").unlink()
    (run / "samples.jsonl").unlink()
    opened = open_page(written(run))
    assert not opened.console
    assert "No step was recorded." in opened.document
    assert titles(opened) == []


@pytest.mark.parametrize(
    "value", [None, float("nan"), float("inf"), "many", [1], {"0": 1}, 10**400], ids=lambda v: str(v)[:9]
)
def test_a_metric_that_is_no_number(tmp_path: Path, value: object):
    run = write_run(tmp_path / "odd", 5)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[2] |= dict.fromkeys(
        ("loss", "grad_norm", "reward/avg", "staleness/max", "time/publish", "tokens/trained"), value
    )
    if isinstance(value, str | list):
        rows[2]["staleness/histogram"] = {"0": 0} if isinstance(value, str) else {"0": value, "old": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_page(written(run))
    assert not opened.console
    assert len(titles(opened)) == ALL_FIGURES


def test_several_runs_share_their_figures(tmp_path: Path):
    runs = [write_run(tmp_path / name, steps) for name, steps in (("one", 40), ("other", 1500), ("third", 3))]
    opened = open_page(written(*runs), then=PAINTED)
    assert not opened.console
    assert int(opened.noted("painted")) > 100
    found = titles(opened)
    assert len(found) == ALL_FIGURES + 2 * 2  # a stack is of one run
    assert "Seconds of a step: other" in found
    reward = opened.document.split("<h3>Sampled reward")[1].split("</figure>")[0]
    assert all(f">{name}" in reward for name in ("one", "other", "third"))


HUES = """
const hues = {};
document.querySelectorAll('figure').forEach(figure => {
  const title = figure.querySelector('h3').textContent;
  if (!title.startsWith('Trained tokens') && !title.startsWith('Seconds')) return;
  hues[title] = Object.fromEntries([...figure.querySelectorAll('.u-series')].slice(1).map(row =>
    [row.querySelector('.u-label').textContent, row.querySelector('.u-marker').style.background]));
});
document.documentElement.dataset.hues = encodeURIComponent(JSON.stringify(hues));
"""


def test_a_part_has_one_colour_in_all_runs(tmp_path: Path):
    young = {"staleness/histogram": {"0": 5, "2": 5}, "time/publish": 9.0, "time/step": 20.0}
    runs = [write_run(tmp_path / "young", 3, **young), write_run(tmp_path / "old", 3)]
    opened = open_page(written(*runs), then=HUES)
    assert not opened.console
    hues = json.loads(unquote(opened.noted("hues")))
    for title in ("Trained tokens by staleness", "Seconds of a step"):
        one, other = hues[f"{title}: young"], hues[f"{title}: old"]
        assert len(one) > 1
        assert all(one[label] == other[label] for label in one)
        assert len(set(other.values())) == len(other)


CHOOSE = """
const notes = document.documentElement.dataset;
const zoomed = () => JSON.parse(Object.values(sessionStorage)[0] ?? '{}').steps;
const boxes = [...document.querySelectorAll('details')].slice(0, 5);
const say = () => {
  notes.steps = zoomed();
  notes.colour = document.querySelector('input[name=colour]:checked').value;
  notes.opened = boxes.map(box => Number(box.open)).join('');
};
if (window.name !== 'again') {
  window.name = 'again';
  document.querySelector('input[value=weight]').click();
  boxes[0].open = !boxes[0].open;
  boxes[4].open = !boxes[4].open;
  const over = document.querySelector('.u-over'), { left, top, width } = over.getBoundingClientRect();
  const at = (kind, x) => over.dispatchEvent(new MouseEvent(kind,
    { bubbles: true, clientX: left + x, clientY: top + 50, button: 0, movementX: 1, movementY: 1 }));
  setTimeout(() => {
    at('mouseenter', 0); at('mousemove', width / 4); at('mousedown', width / 4);
    at('mousemove', width / 2); at('mouseup', width / 2);
    setTimeout(() => location.reload(), 100);
  }, 100);
} else say();
"""


def test_what_was_chosen_outlives_a_reload(tmp_path: Path):
    """Zoom, colouring, and which responses are open, as where a page that is watched loads itself again."""
    opened = open_page(
        written(write_run(tmp_path / "watched", 20, num_samples=1)), then=CHOOSE, waits_ms=5000
    )
    assert not opened.console
    low, high = map(float, opened.noted("steps").split(","))
    assert 1 < low < 7 < 9 < high < 12
    assert opened.noted("colour") == "weight"
    assert opened.noted("opened") == "10001"


TOUCH = """
const notes = document.documentElement.dataset;
const tokens = () => [...document.querySelectorAll('details[open] .token')];
notes.versions = new Set(tokens().map(token => token.style.background)).size;
notes.clipped = tokens().filter(token => token.classList.contains('clipped')).length;
notes.seams = tokens().filter(token => token.classList.contains('seam')).length;
tokens()[1].click();
notes.said = document.querySelector('details[open] .response + .quiet').textContent;
document.querySelector('input[value=weight]').click();
notes.weights = tokens().map(token => token.style.background).join(' ');
"""


def test_sampled_responses_are_coloured_by_version_and_by_weight(tmp_path: Path):
    run = write_run(tmp_path / "sampled", 2, num_samples=0)
    sample = sample_of(5, np.random.default_rng(1), length=4)
    sample |= {"importance_weight": [None, 0.5, 1.0, 1.0, 2.0], "clipped": [None, False, False, False, True]}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    opened = open_page(written(run), then=TOUCH)
    assert not opened.console
    assert {name: opened.noted(name) for name in ("versions", "clipped", "seams")} == {
        "versions": "2",
        "clipped": "1",
        "seams": "1",
    }
    assert opened.noted("said").startswith(
        "Token 2, &quot;word &quot;: version 2, 2 behind, sampled with log-prob -0.5"
    )
    assert opened.noted("weights").count("transparent") == 2


def test_nothing_of_a_run_is_taken_for_markup(tmp_path: Path):
    attack = (
        "</script><script>document.documentElement.dataset.owned = 1</script><img src=x onerror=alert(1)>"
    )
    run = write_run(
        tmp_path / "<img src=x onerror=document.documentElement.dataset.owned=1>", 3, num_samples=0
    )
    samples = [
        sample_of(1, np.random.default_rng(1), length=2) | {"prompt": attack, "texts": ["", attack, ""]}
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (run / "config.yaml").write_text(f"model:\n  hf_path: {json.dumps(attack)}\n")
    opened = open_page(written(run))
    assert not opened.console
    root = opened.document.partition("<html")[2].partition(">")[0]
    assert "data-drawn-ms" in root
    assert "data-owned" not in root
    assert "<img" not in opened.document


def test_half_a_character_is_no_obstacle(tmp_path: Path):
    run = write_run(tmp_path / "odd", 1, num_samples=0)
    sample = sample_of(1, np.random.default_rng(1), length=1) | {
        "texts": ["", "\ud800"],
        "response": "\ud800",
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert "\\ud800" in written(run).read_text(encoding="utf-8")
