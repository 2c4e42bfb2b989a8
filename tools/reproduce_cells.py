"""The cells of the experiment: one run each, of one method under one staleness with one seed, and how it is run.

A cell is a folder under OUT/cells, made by the `train` command with a few keys replaced; its summary.json says that it
is done. All cells start from one checkpoint. What is read out of them is in `reproduce_results.py`.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from megatron_a3po.__main__ import main as megatron_a3po
from megatron_a3po.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_NEEDS_PERSON
from megatron_a3po.lifetime import end_with_parent

Mode = Literal["fixed", "bound"]
Policy = Literal["wait", "drop", "train"]

COUPLED = ("actor.use_decoupled_loss=false", "actor.prox_logp_method=recompute")
METHODS: dict[str, tuple[str, ...]] = {
    "loglinear": ("actor.prox_logp_method=loglinear",),
    "linear": ("actor.prox_logp_method=linear",),
    "recompute": ("actor.prox_logp_method=recompute",),
    "coupled": COUPLED,
    "metrics": ("actor.prox_logp_method=metrics",),
    "forced": ("actor.prox_logp_method=recompute", "actor.recompute_every_token=true"),
}
COMPARED = ("loglinear", "linear", "recompute", "coupled")
POLICIES: tuple[Policy, ...] = ("wait", "drop", "train")
POLL_S = 0.5


@dataclass(frozen=True)
class Cell:
    """One run. `fixed`: every sample is `staleness` versions old; `bound`: free-running, `staleness` at most. A `gain`
    cell is of the asynchronous gain: no group is left out, so that every run generates the same number of samples."""

    method: str
    mode: Mode
    staleness: int
    mini_batches: int
    seed: int
    steps: int
    policy: Policy = "wait"
    gain: bool = False
    lr_warmup_iters: int | None = None  # None: as configured

    @property
    def name(self) -> str:
        age = f"{'d' if self.mode == 'fixed' else 'bound'}{self.staleness}"
        if self.gain:
            return f"gain-{age}-{self.policy}-s{self.seed}"
        return f"{self.method}-{age}-m{self.mini_batches}-s{self.seed}"

    def overrides(self) -> list[str]:
        """The keys that make the configuration this cell's."""
        fixed = self.mode == "fixed"
        return [
            f"trainer.seed={self.seed}",
            f"trainer.steps={self.steps}",
            f"actor.num_mini_batches={self.mini_batches}",
            *([] if self.lr_warmup_iters is None else [f"actor.lr_warmup_iters={self.lr_warmup_iters}"]),
            *METHODS[self.method],
            f"rollout.fixed_staleness={self.staleness if fixed else 'null'}",
            f"rollout.max_staleness={'null' if fixed else self.staleness}",
            f"rollout.staleness_policy={'null' if fixed else self.policy}",
            *(["rollout.filter_no_signal=false"] if self.gain else []),
        ]


def grid(
    methods: Sequence[str],
    staleness: Sequence[int],
    bounds: Sequence[int],
    mini_batches: Sequence[int],
    seeds: Sequence[int],
    steps: int,
) -> list[Cell]:
    """Every method at every staleness, `metrics` with the first seed once for each; forced recompute, which trains as
    recompute does, once for its time. Seed by seed, so that an early end leaves whole comparisons."""
    ages: list[tuple[Mode, int]] = [*(("fixed", d) for d in staleness), *(("bound", eta) for eta in bounds)]
    cells = []
    for seed, m, (mode, d) in itertools.product(seeds, mini_batches, ages):
        measured = ["metrics"] if mode == "fixed" and seed == seeds[0] else []
        cells += [Cell(method, mode, d, m, seed, steps) for method in (*methods, *measured)]
    if "recompute" in methods and staleness:
        cells += [Cell("forced", "fixed", max(staleness), m, seeds[0], steps) for m in mini_batches]
    return cells


def gain_grid(
    method: str, bounds: Sequence[int], mini_batches: int, seeds: Sequence[int], steps: int
) -> list[Cell]:
    """Generate, then train (bound 0), against every bound under every policy; seed by seed."""
    ways: list[tuple[int, Policy]] = [(0, "wait"), *itertools.product(bounds, POLICIES)]
    return [
        Cell(method, "bound", bound, mini_batches, seed, steps, policy, gain=True)
        for seed in seeds
        for bound, policy in ways
    ]


class Cells:
    """The cells under a folder: which are done, and running one. `stopped` is asked while one runs."""

    def __init__(self, out: Path, config: str, start: Path | None, stopped: Callable[[], bool]) -> None:
        self.out, self.config, self.start, self._stopped = out, config, start, stopped

    def directory(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.name

    def done(self, cell: Cell) -> bool:
        return (self.directory(cell) / "summary.json").is_file()

    def steps_done(self, cell: Cell) -> int:
        """Rows recorded; a step taken again by a resumed run has two."""
        try:
            return (self.directory(cell) / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def arguments(self, cell: Cell) -> list[str]:
        """What follows `python -m megatron_a3po`."""
        shared = [] if self.start is None else start_keys(self.start)
        return ["train", self.config, f"run_dir={self.directory(cell)}", *shared, *cell.overrides()]

    def run(self, cell: Cell, watch: Callable[[int], None]) -> int:
        """Run or continue it, `watch(steps done)` meanwhile; the command's exit code."""
        directory = self.directory(cell)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cell.json").write_text(json.dumps(asdict(cell)))
        log = self.out / "logs" / f"{cell.name}.log"
        return run_command(self.arguments(cell), log, self._stopped, lambda: watch(self.steps_done(cell)))


def start_keys(start: Path) -> list[str]:
    """A run from a checkpoint instead of its own warm start."""
    return [f"model.hf_path={start}", "model.initialization=pretrained", "warm_start=null"]


def found_cells(out: Path) -> Iterable[tuple[Cell, Path]]:
    """Every finished cell under a folder, from this call of the tool or an earlier one."""
    for summary in sorted(out.glob("cells/*/summary.json")):
        if (file := summary.with_name("cell.json")).is_file():
            yield Cell(**json.loads(file.read_text())), summary.parent


def run_command(
    arguments: Sequence[str], log: Path, stopped: Callable[[], bool], watch: Callable[[], None]
) -> int:
    """`python -m megatron_a3po ARGUMENTS` in a fork of this process, torch imported. Its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process = multiprocessing.get_context("fork").Process(target=_command, args=(arguments, log, os.getpid()))
    process.start()
    told = False
    while process.is_alive():
        process.join(POLL_S)
        watch()
        if stopped() and not told:
            _tell(process)
            told = True
    return process.exitcode if process.exitcode is not None else EXIT_BAD_INPUT


def last_words(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _command(arguments: Sequence[str], log: Path, parent: int) -> None:
    end_with_parent(parent)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    code = EXIT_NEEDS_PERSON
    try:
        code = megatron_a3po(list(arguments))
    except SystemExit as error:
        code = EXIT_BAD_INPUT if error.code else EXIT_DONE
    except BaseException:  # the fork's last word, whatever it is
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(process: BaseProcess) -> None:
    """Stop with a checkpoint."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
