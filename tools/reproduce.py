#!/usr/bin/env python
"""The comparison behind A-3PO in one command: the same task under each method and staleness, from one warm start.

    tools/reproduce.py CONFIG --out DIR                  loglinear, linear, recompute, coupled at staleness 0, 2, 8
    tools/reproduce.py CONFIG --out DIR --full           every staleness, free-running too, 1 and 4 mini-batches
    tools/reproduce.py CONFIG --out DIR --asynchronous   synchronous against asynchronous, under each policy

One run at a time, each with the `train` command. Stopped, it is continued by the same command: what is done is not done
again. DIR gets results.md, results.json and .csv, plots, and report.html, of all finished runs in it, those of
earlier calls too. The warm start of CONFIG runs once; without one every run starts from the checkpoint CONFIG names.
"""

import argparse
import contextlib
import datetime
import importlib.util
import io
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_a3po.__main__ import main as megatron_a3po
from megatron_a3po.config import Config, load_config
from megatron_a3po.config.difference import flat
from megatron_a3po.environment import set_default
from megatron_a3po.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NEEDS_PERSON,
    EXIT_STOPPED,
    A3POError,
    ConfigError,
    InputError,
)
from megatron_a3po.lifetime import StopWish

set_default("OMP_NUM_THREADS", "1")  # of every run: forks find torch imported
from reproduce_cells import (  # noqa: E402
    COMPARED,
    Cell,
    Cells,
    gain_grid,
    grid,
    last_words,
    run_command,
)
from reproduce_results import program_rows, read_results, write_rows  # noqa: E402
from reproduce_tables import tables  # noqa: E402

from megatron_a3po.trainer.summary import duration, read_summary  # noqa: E402
from megatron_a3po.weights.aside import write_aside  # noqa: E402

FULL_STALENESS = (0, 1, 2, 4, 8, 16)
FULL_BOUNDS = (1, 2, 4, 8)
COMMANDS = "commands.txt"
OF_THE_START = ("run_dir", "warm_start", "model.hf_path", "model.initialization")
START_KEYS = ("trainer.steps=1", "actor.lr_warmup_iters=0", "actor.kl_coef=1e-6")
SHAPES_THE_START = ("model.", "data.", "warm_start", "trainer.seed")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    stop = StopWish.listening()
    try:
        config = load_config(arguments.config)
        cells = planned(arguments, config)
        code = EXIT_DONE if arguments.tables_only else run(arguments, config, cells, stop)
        write_results(arguments)
    except A3POError as error:
        sys.stderr.write("".join(f"{problem}\n" for problem in error.problems))
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if code == EXIT_STOPPED:
        print("stopped: the same command goes on from here", file=sys.stderr)
    return code


def planned(arguments: argparse.Namespace, config: Config) -> list[Cell]:
    """The cells the command line asks for."""
    steps = arguments.steps or config.trainer.steps
    mini_batches = arguments.mini_batches or ((1, 4) if arguments.full else (4,))
    staleness = arguments.staleness
    cells: list[Cell] = []
    if arguments.asynchronous and not arguments.full:
        given = {"--methods": arguments.methods, "--staleness": staleness, "--free": arguments.free}
        given["several --mini-batches"] = mini_batches[1:]
        if names := [name for name, value in given.items() if value]:
            raise InputError(
                f"--asynchronous compares loglinear by bounds and policies: leave out {', '.join(names)}, or ask for "
                "that in a call of its own."
            )
    else:
        cells += grid(
            arguments.methods or COMPARED,
            (FULL_STALENESS if arguments.full else (0, 2, 8)) if staleness is None else staleness,
            arguments.free or (FULL_BOUNDS if arguments.full else ()),
            mini_batches,
            arguments.seeds,
            steps,
        )
    if arguments.full or arguments.asynchronous:
        cells += gain_grid("loglinear", arguments.bounds, mini_batches[-1], arguments.seeds, steps)
    return [replace(cell, lr_warmup_iters=_warmup(config, cell)) for cell in cells]


def _warmup(config: Config, cell: Cell) -> int:
    """As many steps of a run as the configuration warms up for, whatever its number of optimizer steps in one."""
    return round(config.actor.lr_warmup_iters * cell.mini_batches / config.actor.num_mini_batches)


def run(arguments: argparse.Namespace, config: Config, planned: list[Cell], stop: StopWish) -> int:
    """Every cell that is not done; the exit code of the whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is not installed; `doctor` tells that in words
        import megatron_a3po.trainer.worker  # noqa: F401  imported once, for all forks
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the plots need matplotlib: `make install`, or pip install matplotlib.")
    refuse_unfit(arguments.config, planned)
    refuse_others(arguments, planned)
    remember(arguments)
    out, shown = arguments.out, Shown(sum(cell.steps for cell in planned), len(planned))
    with shown:
        start = shared_start(arguments, config, stop, shown)
        if isinstance(start, int):
            return start
        cells = Cells(out, arguments.config, start, lambda: stop.wished)
        shown.begin()
        failed: list[Cell] = []
        for cell in planned:
            if cells.done(cell):
                shown.skip(cell)
                continue
            code = cells.run(cell, lambda steps, cell=cell: shown.at(cell, steps))
            if code == EXIT_DONE:
                shown.finished(cell, cells.directory(cell))
                continue
            if stop.wished or code in (EXIT_STOPPED, EXIT_INTERRUPTED):
                shown.say(f"stopped in {cell.name}")
                return EXIT_STOPPED
            shown.say(f"{cell.name} ended with code {code}:\n{last_words(out / 'logs' / f'{cell.name}.log')}")
            if code == EXIT_BAD_INPUT:
                return code
            failed.append(cell)
    if failed:
        print(f"failed, and not in the tables: {', '.join(cell.name for cell in failed)}", file=sys.stderr)
    return EXIT_NEEDS_PERSON if failed else EXIT_DONE


def refuse_unfit(config: str, cells: Sequence[Cell]) -> None:
    """Errors: ConfigError where the configuration does not allow a cell, before anything is run for the others."""
    for cell in cells:
        try:
            load_config(config, cell.overrides())
        except ConfigError as error:
            raise ConfigError([f"{cell.name}: {problem}" for problem in error.problems]) from None


def refuse_others(arguments: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Errors: InputError where a run in the folder is of another task or length than this call asks for, or the warm
    start of another model, of other data or length."""
    here, problems = Cells(arguments.out, arguments.config, None, lambda: False), []
    start = arguments.out / "start"
    others = {start: [key for key in _differences(start, arguments.config, START_KEYS)
                      if key.startswith(SHAPES_THE_START)]}  # fmt: skip
    for cell in cells:
        keys = _differences(here.directory(cell), arguments.config, cell.overrides())
        others[here.directory(cell)] = [key for key in keys if not key.startswith(OF_THE_START)]
    for directory, keys in others.items():
        if keys:
            problems.append(
                f"{directory} is a run with another {', '.join(keys)}: give another --out, or move it aside."
            )
    if problems:
        raise InputError(problems)


def _differences(run_dir: Path, config: str, overrides: Sequence[str]) -> list[str]:
    """The keys that a run, where there is one, has with other values."""
    if not (file := run_dir / "config.yaml").is_file():
        return []
    had: dict[str, Any] = flat(OmegaConf.to_container(OmegaConf.load(file)))
    wanted = flat(load_config(config, overrides).model_dump(mode="json"))
    return sorted(key for key in wanted.keys() & had.keys() if had[key] != wanted[key])


def remember(arguments: argparse.Namespace) -> None:
    """The commands that runs in this folder came from, each once; the results name them."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = dict.fromkeys([*known_commands(arguments.out), arguments.command])
    write_aside(arguments.out / COMMANDS, "".join(f"{line}\n" for line in lines))


def known_commands(out: Path) -> list[str]:
    """Those there is a note of."""
    return (out / COMMANDS).read_text().splitlines() if (out / COMMANDS).is_file() else []


def shared_start(
    arguments: argparse.Namespace, config: Config, stop: StopWish, shown: "Shown"
) -> Path | int | None:
    """The checkpoint all cells start from, made once; None: the one the configuration names. An int is the exit code of
    a warm start that did not end.

    A run with a KL term keeps the policy its RL steps begin with as a Hugging Face checkpoint, reference/: the shared
    start is that of a run of one step.
    """
    if config.warm_start is None:
        return None
    run_dir = arguments.out / "start"
    if not (run_dir / "summary.json").is_file():
        shown.say(f"the shared warm start, {config.warm_start.steps} steps")
        log = arguments.out / "logs" / "start.log"
        argv = ["train", arguments.config, f"run_dir={run_dir}", *START_KEYS]
        code = run_command(argv, log, lambda: stop.wished, lambda: None)
        if code != EXIT_DONE:
            shown.say(f"the warm start ended with code {code}:\n{last_words(log)}")
            return code if code > 0 else EXIT_NEEDS_PERSON
    return run_dir / "reference"


class Shown:
    """The progress: a bar on a terminal, a line a run elsewhere. It has no thread, which a fork would not survive."""

    def __init__(self, total_steps: int, total_cells: int) -> None:
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=total_steps, left="")
        self._total, self._total_cells = total_steps, total_cells
        self._cells = self._skipped = self._done = 0
        self._started = time.monotonic()

    def begin(self) -> None:
        """From here on time counts for what is left."""
        self._started = time.monotonic()

    def __enter__(self) -> "Shown":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def at(self, cell: Cell, steps: int) -> None:
        """Cell `cell` has taken so many steps."""
        if self._console.is_terminal:
            self._update(cell.name, self._skipped + self._done + min(steps, cell.steps))

    def skip(self, cell: Cell) -> None:
        self._cells += 1
        self._skipped += cell.steps

    def finished(self, cell: Cell, run_dir: Path) -> None:
        self._cells += 1
        self._done += cell.steps
        summary = read_summary(run_dir) or {}
        accuracy = summary.get("accuracy_after")
        reached = "" if accuracy is None else f", accuracy {accuracy:.3f}"
        seconds = duration(summary.get("wall_seconds", 0.0))
        self.say(f"{self._cells}/{self._total_cells} {cell.name}: {seconds}{reached}; {self._left()}")

    def _left(self) -> str:
        """By what the runs of this call took, their starts included."""
        rest = self._total - self._skipped - self._done
        if not rest or not self._done:
            return "" if rest else "done"
        return f"{duration(rest * (time.monotonic() - self._started) / self._done)} to go"

    def _update(self, name: str, steps: int) -> None:
        self._bar.update(self._task, description=name, completed=steps, left=self._left())
        self._bar.refresh()


def write_results(arguments: argparse.Namespace) -> None:
    """Tables, rows for programs, plots and the page of figures, of every finished run under the folder."""
    out = arguments.out
    if not (rows := read_results(out)):
        if arguments.tables_only:
            raise InputError(f"{out} has no finished run: give the --out of an earlier call.")
        return
    from reproduce_plots import draw

    write_rows(rows, out / "results.json", out / "results.csv")
    if arguments.json:
        arguments.json.write_text(json.dumps(program_rows(rows), indent=1) + "\n")
    plots = draw(rows, out / "cells", out)
    written = [f"## {title}\n\n{table}\n" for title, table in tables(rows)]
    pictures = [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    text = "\n".join([_heading(arguments, len(rows)), *written, *pictures])
    write_aside(out / "results.md", text)
    seed = min(row["seed"] for row in rows)
    overlaid = [row["name"] for row in rows if row["seed"] == seed and row["staleness"] == _oldest(rows)]
    with contextlib.redirect_stdout(io.StringIO()):
        directories = [str(out / "cells" / name) for name in overlaid]
        megatron_a3po(["report", *directories, "--out", str(out / "report.html")])
    print(text)
    print(
        f"in {out}: results.md, results.json, results.csv, {', '.join(plot.name for plot in plots)}, report.html"
    )


def _oldest(rows: list[dict]) -> int:
    return max((row["staleness"] for row in rows if row["mode"] == "fixed"), default=rows[-1]["staleness"])


def _heading(arguments: argparse.Namespace, num_runs: int) -> str:
    start = read_summary(arguments.out / "start")
    accuracy = start and start.get("accuracy_before")
    commands = "".join(f"    {line}\n" for line in known_commands(arguments.out))
    began = "" if accuracy is None else f" All start from one warm start, of accuracy {accuracy:.3f}."
    return (
        f"# {num_runs} runs of {arguments.config}\n\n{commands}\n"
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs.{began} Mean ± standard deviation over "
        "seeds; reward and entropy at the end, weights and errors over the steps whose samples are as stale as is "
        "said, seconds are medians.\n"
    )


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("config", metavar="CONFIG", help="the task, a configuration of `train`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and results go")
    parser.add_argument("--methods", nargs="+", choices=list(COMPARED), help="(default: all)")
    parser.add_argument(
        "--staleness",
        type=int,
        nargs="*",
        metavar="N",
        help="fixed staleness (default: 0 2 8); no number: none",
    )
    parser.add_argument("--free", help="free-running as well, with these bounds", **number)
    parser.add_argument("--mini-batches", help="optimizer steps in a training step (default: 4)", **number)
    parser.add_argument("--seeds", default=[1, 2, 3], **number)
    parser.add_argument("--steps", type=positive, metavar="N", help="of each run (default: trainer.steps)")
    parser.add_argument("--full", action="store_true", help="the whole grid, hours on two cores")
    parser.add_argument("--asynchronous", action="store_true", help="the asynchronous gain instead")
    parser.add_argument("--bounds", default=[1, 2, 4, 8], help="of the asynchronous gain", **number)
    parser.add_argument("--tables-only", action="store_true", help="results of what is there; run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times of a step there, as rows")
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["tools/reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    return arguments


if __name__ == "__main__":
    sys.exit(main())
