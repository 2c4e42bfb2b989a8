"""`report RUN_DIR ...`: what runs did, side by side: a table on the terminal, and a page of figures in a file.

Crashed and unfinished runs are reported like all others, by what they recorded. Imports no torch.
"""

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_a3po.errors import EXIT_DONE, InputError
from megatron_a3po.trainer.recording import METRICS
from megatron_a3po.trainer.report.page import page
from megatron_a3po.trainer.report.past import Past, is_run, read_past
from megatron_a3po.trainer.report.verdict import differing_keys, figures
from megatron_a3po.trainer.summary import SUMMARY
from megatron_a3po.weights.aside import write_aside

PAGE = "report.html"
PIPE_WIDTH = 240
WATCH_S = 10


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the page; with --watch until every run has ended, or ctrl-C."""
    directories = [Path(name) for name in arguments.run_dirs]
    if problems := [_no_run(directory) for directory in directories if not is_run(directory)]:
        raise InputError(problems)
    out = Path(arguments.out) if arguments.out else _default_out(directories)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    pasts = [read_past(directory) for directory in directories]
    console.print(comparison(pasts))
    console.print(f"page: {out.resolve()}", soft_wrap=True, markup=False, highlight=False)
    _write(out, pasts, watched=arguments.watch)
    with suppress(KeyboardInterrupt):  # which is how a person ends it
        while arguments.watch and not all(past.is_over for past in pasts):
            time.sleep(WATCH_S)
            pasts = [read_past(directory) for directory in directories]
            _write(out, pasts, watched=True)
    return EXIT_DONE


def comparison(pasts: list[Past]) -> Table:
    """A column for each run; below what they did, the keys in which they were configured differently."""
    table = Table()
    table.add_column("run", no_wrap=True)
    for past in pasts:
        table.add_column(escape(str(past.directory)), overflow="fold")
    columns = [figures(past) for past in pasts]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    table.add_section()
    for key, values in differing_keys(pasts).items():
        table.add_row(key, *map(escape, values))
    return table


def _write(out: Path, pasts: list[Past], *, watched: bool) -> None:
    """A page that is watched loads itself again for as long as a run goes on."""
    goes_on = watched and not all(past.is_over for past in pasts)
    text = page(pasts, reload_s=WATCH_S if goes_on else None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, text)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}): name another file with --out."
        ) from None


def _default_out(directories: list[Path]) -> Path:
    if len(directories) == 1:
        return directories[0] / PAGE
    return Path(os.path.commonpath([directory.resolve().parent for directory in directories])) / PAGE


def _no_run(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a folder: give the directory of a run."
    return (
        f"{directory} is no run, it has no {METRICS}, no {SUMMARY} and no logs: give the directory of a run."
    )
