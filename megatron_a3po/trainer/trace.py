"""The timeline of a few steps, `trainer.trace`: trainer ranks, rollout process and engines, on one clock.

`<run_dir>/trace.json` is in the format of Chrome's tracing, which ui.perfetto.dev draws. A rank's spans are its step
and the parts of it, as `clock.py` has them; the others come from `rollout/spans.py`. All times are the hosts': what a
GPU still works off after a call has returned is not seen. The loop calls `follow` after every step.
"""

import json
import logging
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_a3po.actor.grid import Grid
from megatron_a3po.rollout.spans import Span
from megatron_a3po.trainer.clock import Clock
from megatron_a3po.trainer.recording import TRACE
from megatron_a3po.weights.aside import what_failed, write_aside

if TYPE_CHECKING:
    from megatron_a3po.trainer.loop import Run

logger = logging.getLogger(__name__)
TRAINER = "trainer"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def follow(run: "Run") -> None:
    """Keep what this rank did in the step just taken; after the window's last step write the file. Collective."""
    window, step, grid = run.config.trainer.traced_steps, run.progress.step, run.actor.grid
    if step not in window:
        return
    track = f"rank {grid.world_rank} (tp {grid.tp.rank}, pp {grid.pp.rank}, dp {grid.dp.rank})"
    run.timeline += spans_of(step, run.clock, track)
    if step == window[-1]:
        spans = gathered(grid, run.timeline)
        if grid.is_main:
            start, end = min(span.start for span in spans), max(span.end for span in spans)
            spans += run.client.spans(start, end) if run.client else []
            _write(run.run_dir / TRACE, trace_of(spans))


def spans_of(step: int, clock: Clock, track: str) -> list[Span]:
    """A step of this rank and the parts of it."""
    whole = Span(TRAINER, track, f"step {step}", clock.started, time.monotonic())
    parts = [
        Span(TRAINER, track, part.replace("_", " "), start, end)
        for part, intervals in clock.intervals.items()
        for start, end in intervals
    ]
    return [whole, *parts]


def gathered(grid: Grid, spans: list[Span]) -> list[Span]:
    """Every rank's spans by rank 0's clock, on rank 0; nothing on the others. Collective."""
    # Processes of a machine have one clock. Others are set by a barrier, which all leave within a millisecond.
    dist.barrier(group=grid.host_group)
    mine = (BOOT_ID.read_text() if BOOT_ID.is_file() else "", time.monotonic(), spans)
    everyone: list[Any] = [None] * grid.world_size
    dist.all_gather_object(everyone, mine, group=grid.host_group)
    if not grid.is_main:
        return []
    machine, now, _ = everyone[0]
    return [
        _moved(span, 0.0 if its_machine == machine else now - its_now)
        for its_machine, its_now, its_spans in everyone
        for span in its_spans
    ]


def trace_of(spans: Iterable[Span]) -> dict[str, Any]:
    """The file's content: times in microseconds from the earliest span on."""
    spans = sorted(spans, key=lambda span: (span.process != TRAINER, span.process, span.track))
    origin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for pid, (process, of_process) in enumerate(groupby(spans, lambda span: span.process), start=1):
        events.append(_name("process", pid, 0, process))
        tid = 0
        for track, of_track in groupby(of_process, lambda span: span.track):
            for lane in lanes(of_track, nested=process == TRAINER):
                tid += 1
                events.append(_name("thread", pid, tid, track))
                events += [_event(span, pid, tid, origin) for span in lane]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lanes(spans: Iterable[Span], *, nested: bool) -> list[list[Span]]:
    """The spans of a track in as few rows as show no two at once; where they may be nested, one within another."""
    rows: list[list[Span]] = []
    opened: list[list[float]] = []  # of each row, the ends of what has not ended
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        for ends in opened:
            while ends and ends[-1] <= span.start:
                ends.pop()
        fitting = (n for n, ends in enumerate(opened) if not ends or (nested and span.end <= ends[-1]))
        place = next(fitting, len(rows))
        if place == len(rows):
            rows.append([])
            opened.append([])
        rows[place].append(span)
        opened[place].append(span.end)
    return rows


def _write(file: Path, trace: dict[str, Any]) -> None:
    try:
        write_aside(file, json.dumps(trace))
    except OSError as error:
        logger.error("%s: there is no timeline, and the run goes on", what_failed(error, file))


def _moved(span: Span, seconds: float) -> Span:
    return Span(span.process, span.track, span.name, span.start + seconds, span.end + seconds, span.details)


def _event(span: Span, pid: int, tid: int, origin: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.track,
        "ts": round((span.start - origin) * 1e6, 1),
        "dur": round((span.end - span.start) * 1e6, 1),
        "pid": pid,
        "tid": tid,
        "args": span.details,
    }


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}
