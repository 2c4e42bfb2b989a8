"""What a training step costs: every way to have the proximal policy against `loglinear`, in one run.

All implementations share one process group, one model and one batch, and take turns in every round, so that what
disturbs the machine disturbs all alike; ratios are medians over rounds of times of the same round. `CPU ratio` is of
processor time over all ranks, which a busy machine disturbs less. Besides them run

    one forward     scoring the whole batch: what a step of forced recompute should cost more than `loglinear`
    bare            forward-backward and optimizer of the same packs by Megatron-Core's own calls: what is not
                    this is the loop's overhead (align, packing, the finiteness check, metrics)

It starts its own ranks on this machine: gloo, or NCCL where there are GPUs. Figures are in docs/benchmarks.md.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_a3po.config.actor import ActorSection
from megatron_a3po.config.model import ModelSection
from megatron_a3po.config.rollout import RolloutSection

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about what is not installed; `doctor` tells that in words
    from synthetic import BatchShape, qwen2_shape, synthetic_batch

    from megatron_a3po.actor.actor import Actor
    from megatron_a3po.actor.grid import Grid, build_grid, leave_grid
    from megatron_a3po.actor.optimizer import Schedule
    from megatron_a3po.actor.packing import MicroBatch
    from megatron_a3po.trainer.batch import align
    from megatron_a3po.trainer.clock import Clock
    from megatron_a3po.trainer.method import Method
    from megatron_a3po.trainer.step import train_step

LOGLINEAR, BARE, FORWARD = "loglinear", "bare", "one forward"
METHODS = {
    LOGLINEAR: {"prox_logp_method": "loglinear"},
    "recompute": {"prox_logp_method": "recompute"},
    "forced recompute": {"prox_logp_method": "recompute", "recompute_every_token": True},
}
PARTS = ("align", "proximal_pass", "forward_backward", "optimizer", "metrics")
Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    world_size = arguments.tp * arguments.pp
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as folder:
        torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            _rank, (world_size, arguments, Path(folder)), nprocs=world_size, start_method="fork"
        )
        rows = json.loads((Path(folder) / "rows.json").read_text())
    print(_heading(arguments))
    for table in _tables(rows):
        print(f"\n{table}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _rank(rank: int, world_size: int, arguments: argparse.Namespace, folder: Path) -> None:
    """One rank's life; rank 0 leaves the rows in `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no dependence on the machine's host name
    section = _section(arguments)
    grid = build_grid(
        section,
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        init_method=f"file://{folder}/rendezvous",
        seed=arguments.seed,
        timeout_s=300,
    )
    rows = Benchmark(arguments, section, grid).rows()
    if grid.is_main:
        (folder / "rows.json").write_text(json.dumps(rows))
    leave_grid()


def _section(arguments: argparse.Namespace, **changes: Any) -> ActorSection:
    return ActorSection(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        sequence_parallel=arguments.sequence_parallel,
        bf16=arguments.bf16,
        max_tokens_per_micro_batch=arguments.tokens,
        **changes,
    )


@dataclass
class Measurement:
    """One implementation, on this rank: seconds, processor seconds, parts and peak memory, each once a round."""

    run: Callable[[Clock], dict[str, float]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    forwards_per_token: float | None = None


@dataclass(frozen=True)
class Found:
    """One implementation over all ranks: seconds of each round are the slowest rank's; parts, of the median round, the
    mean over ranks, so waiting for another stage counts; processor time is the sum over ranks; peak memory of a
    pipeline stage its largest rank's."""

    rounds: list[float]
    cpu_rounds: list[float]
    parts: dict[str, float]
    peak_mb_by_stage: list[float]
    forwards_per_token: float | None


class Benchmark:
    """All cases on one actor."""

    def __init__(self, arguments: argparse.Namespace, section: ActorSection, grid: Grid) -> None:
        self.arguments, self.grid = arguments, grid
        batch_shape = BatchShape(
            arguments.prompts, arguments.samples, arguments.prompt_tokens, arguments.response_tokens
        )
        shape = qwen2_shape(
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            ffn_hidden_size=arguments.ffn,
            num_attention_heads=arguments.heads,
            num_query_groups=arguments.kv_heads,
            vocab_size=arguments.vocab,
            max_position_embeddings=arguments.prompt_tokens + arguments.response_tokens,
        )
        model = ModelSection(hf_path="random", initialization="random")
        self.actor = Actor(section, model, shape, grid, temperature=1.0, seed=arguments.seed)
        self.actor.start_stage(Schedule(section.lr, 0.0, 0, "constant", 1000))
        self.batch = synthetic_batch(batch_shape, arguments.vocab, arguments.seed)
        self.rollout = RolloutSection(max_response_tokens=arguments.response_tokens)

    def rows(self) -> list[Row]:
        """Measure, gather, and make the rows of all cases; the same on every rank."""
        cases = {number: self._case(number) for number in self.arguments.mini_batches}
        turns = [measurement for case in cases.values() for measurement in case.values()]
        for number in range(self.arguments.warm_up + self.arguments.rounds):
            for turn in range(len(turns)):
                # Another one goes first every time.
                self._measure(turns[(turn + number) % len(turns)], keep=number >= self.arguments.warm_up)
        return [row for number, case in cases.items() for row in self._rows(number, self._gathered(case))]

    def _case(self, num_mini_batches: int) -> dict[str, Measurement]:
        sections = {
            name: _section(self.arguments, num_mini_batches=num_mini_batches, **switches)
            for name, switches in METHODS.items()
        }
        steps = {name: Measurement(self._step(section)) for name, section in sections.items()}
        aligned = align(self.batch, sections[LOGLINEAR], self.rollout)
        packs = [self.actor.pack(mini_batch) for mini_batch in aligned]
        method = Method.of(sections[LOGLINEAR])
        return steps | {
            FORWARD: Measurement(self._forward(packs)),
            BARE: Measurement(self._bare(packs, method)),
        }

    def _step(self, section: ActorSection) -> Callable[[Clock], dict[str, float]]:
        method = Method.of(section)

        def run(clock: Clock) -> dict[str, float]:
            with clock("align"):
                mini_batches = align(self.batch, section, self.rollout)
            return train_step(self.actor, mini_batches, method, clock)

        return run

    def _forward(self, packs: list[list[MicroBatch]]) -> Callable[[Clock], dict[str, float]]:
        def run(clock: Clock) -> dict[str, float]:
            with clock("proximal_pass"):
                for pack in packs:
                    self.actor.score(pack)
            return {}

        return run

    def _bare(self, packs: list[list[MicroBatch]], method: Method) -> Callable[[Clock], dict[str, float]]:
        optimizer = self.actor.optimizer
        assert optimizer is not None

        def run(clock: Clock) -> dict[str, float]:
            for number, pack in enumerate(packs):
                with clock("forward_backward"):
                    optimizer.zero_grad()
                    self.actor.pipeline.train(pack, method.objective(number))
                with clock("optimizer"):
                    optimizer.megatron.step()
                    optimizer.scheduler.step(1)
            return {}

        return run

    def _measure(self, measurement: Measurement, *, keep: bool) -> None:
        device = self.grid.device
        clock = DeviceClock(device)
        dist.barrier()
        reset_peak_memory(device)
        dist.barrier()
        start, cpu_start = time.monotonic(), time.process_time()
        metrics = measurement.run(clock)
        wait_for(device)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
        if metrics.get("steps_skipped"):
            raise RuntimeError(
                "a synthetic step met a loss or gradient that is not finite; try another --seed"
            )
        measurement.forwards_per_token = metrics.get("forwards_per_token")
        if keep:
            measurement.seconds.append(seconds)
            measurement.cpu_seconds.append(cpu_seconds)
            measurement.parts.append(clock.seconds)
            measurement.peak_mb.append(peak_memory_mb(device))

    def _gathered(self, case: dict[str, Measurement]) -> dict[str, Found]:
        """What all ranks measured of a case, by implementation."""
        own = {
            name: (m.seconds, m.cpu_seconds, m.parts, max(m.peak_mb), self.grid.pp.rank)
            for name, m in case.items()
        }
        everyone: list[Any] = [None] * self.grid.world_size
        dist.all_gather_object(everyone, own, group=self.grid.host_group)
        found = {}
        for name, measurement in case.items():
            seconds, cpu_seconds, parts, peaks, stages = zip(*(rank[name] for rank in everyone), strict=True)
            rounds = [max(times) for times in zip(*seconds, strict=True)]
            typical = rounds.index(statistics.median_low(rounds))
            found[name] = Found(
                rounds,
                [sum(times) for times in zip(*cpu_seconds, strict=True)],
                {part: statistics.fmean(rank[typical].get(part, 0.0) for rank in parts) for part in PARTS},
                [
                    max(peak for peak, stage in zip(peaks, stages, strict=True) if stage == wanted)
                    for wanted in range(self.grid.pp.size)
                ],
                measurement.forwards_per_token,
            )
        return found

    def _rows(self, num_mini_batches: int, found: dict[str, Found]) -> list[Row]:
        base = f"{num_mini_batches} mini-batch{'es' if num_mini_batches > 1 else ''}"
        forward = ratio(found[FORWARD].rounds, found[LOGLINEAR].rounds)
        cpu_forward = ratio(found[FORWARD].cpu_rounds, found[LOGLINEAR].cpu_rounds)
        rows = []
        for name in (*METHODS, FORWARD):
            row = _row(base, name, found[name], found[LOGLINEAR])
            passes = row["forwards_per_token"]
            # Every forward beyond the first is one of scoring, of as many tokens.
            row["predicted_ratio"] = None if passes is None else 1 + (passes - 1) * forward
            row["predicted_cpu_ratio"] = None if passes is None else 1 + (passes - 1) * cpu_forward
            rows.append(row)
        overhead = f"{base}, the loop's overhead"
        rows.append(_row(overhead, BARE, found[BARE], found[BARE]))
        rows.append(_row(overhead, f"step ({LOGLINEAR})", found[LOGLINEAR], found[BARE]))
        return rows


def _row(case: str, implementation: str, found: Found, baseline: Found) -> Row:
    seconds = statistics.median_low(found.rounds)
    return {
        "case": case,
        "implementation": implementation,
        "seconds": seconds,
        "ratio": ratio(found.rounds, baseline.rounds),
        "cpu_seconds": statistics.median(found.cpu_rounds),
        "cpu_ratio": ratio(found.cpu_rounds, baseline.cpu_rounds),
        "peak_mb": max(found.peak_mb_by_stage),
        "peak_mb_by_stage": found.peak_mb_by_stage,
        "rounds": len(found.rounds),
        "fastest_s": min(found.rounds),
        "forwards_per_token": found.forwards_per_token,
        **{f"{part}_s": value for part, value in found.parts.items()},
        "other_s": seconds - sum(found.parts.values()),
    }


def ratio(times: list[float], baseline: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(time_ / base for time_, base in zip(times, baseline, strict=True))


class DeviceClock(Clock):
    """A part ends when the device has done its work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        with super().__call__(part):
            yield
            wait_for(self.device)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark: of torch's allocator on a GPU, of the process's resident memory on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _heading(a: argparse.Namespace) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} CPUs, load {load}; "
        f"torch {torch.__version__}\n"
        f"TP {a.tp} x PP {a.pp}, {'bf16' if a.bf16 else 'fp32'}, hidden {a.hidden}, {a.layers} layers, "
        f"vocabulary {a.vocab}; {a.prompts} x {a.samples} samples of up to {a.prompt_tokens} + {a.response_tokens} "
        f"tokens, at most {a.tokens} in a micro-batch; {a.rounds} rounds"
    )


def _tables(rows: list[Row]) -> Iterator[str]:
    """One table for each case, in Markdown."""
    titles = [
        "s",
        "ratio",
        "predicted",
        "CPU ratio",
        "CPU predicted",
        "forwards",
        *(part.replace("_", " ") for part in PARTS),
        "other",
        "peak MB",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines = [f"| {case} | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
        for row in (row for row in rows if row["case"] == case):
            seconds = [f"{row[f'{part}_s']:.3f}" for part in (*PARTS, "other")]
            stages = " / ".join(f"{value:.0f}" for value in row["peak_mb_by_stage"])
            names = ("ratio", "predicted_ratio", "cpu_ratio", "predicted_cpu_ratio", "forwards_per_token")
            numbers = [row.get(name) for name in names]
            known = ["" if number is None else f"{number:.3f}" for number in numbers]
            cells = [row["implementation"], f"{row['seconds']:.3f}", *known, *seconds, stages]
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step times of recompute and forced recompute against loglinear, and the loop's own overhead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--tp", default=1, help="tensor-parallel ranks", **number)
    parser.add_argument("--pp", default=1, help="pipeline stages", **number)
    parser.add_argument(
        "--sequence-parallel", action="store_true", help="sequence parallelism (needs TP > 1)"
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 weights and activations")
    parser.add_argument("--hidden", default=128, help="hidden size", **number)
    parser.add_argument("--layers", default=4, help="layers", **number)
    parser.add_argument("--ffn", default=384, help="feed-forward size", **number)
    parser.add_argument("--heads", default=4, help="attention heads", **number)
    parser.add_argument("--kv-heads", default=2, help="key and value heads", **number)
    parser.add_argument("--vocab", default=17, help="vocabulary", **number)
    parser.add_argument("--prompts", default=32, help="prompts in a step", **number)
    parser.add_argument("--samples", default=8, help="samples of a prompt", **number)
    parser.add_argument("--prompt-tokens", default=8, help="longest prompt", **number)
    parser.add_argument("--response-tokens", default=28, help="longest response", **number)
    parser.add_argument("--tokens", default=2048, help="most tokens in a micro-batch", **number)
    parser.add_argument(
        "--mini-batches", default=[1, 4], nargs="+", help="cases: mini-batches in a step", **number
    )
    parser.add_argument("--rounds", default=7, help="measured rounds", **number)
    parser.add_argument("--warm-up", default=2, help="rounds before", **number)
    parser.add_argument("--seed", default=1, help="of weights and batch", **number)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
