"""What `benchmark_step` measures: one actor and one batch, and the ways to take a step that take turns on them.

Each way is a `Measurement` on every rank; `Benchmark.rows` gathers them over the ranks into the rows the command
prints. The memory of the last stage is in `step_memory.py`.
"""

import argparse
import resource
import statistics
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
    from step_memory import DensePipeline, Peaks, lone_sequence, measure_peaks
    from synthetic import BatchShape, qwen2_shape, synthetic_batch

    from megatron_a3po.actor.actor import Actor
    from megatron_a3po.actor.grid import Grid
    from megatron_a3po.actor.optimizer import Schedule
    from megatron_a3po.actor.packing import MicroBatch
    from megatron_a3po.actor.pipeline import Pipeline
    from megatron_a3po.algorithm.proximal import interpolate
    from megatron_a3po.trainer.batch import align
    from megatron_a3po.trainer.clock import Clock
    from megatron_a3po.trainer.method import Method
    from megatron_a3po.trainer.step import train_step

LOGLINEAR, FORCED, DENSE, BARE = "loglinear", "forced recompute", "loglinear, dense logits", "bare"
FORWARD, PROXIMAL = "one forward", "proximal policy"
METHODS = {
    LOGLINEAR: {"prox_logp_method": "loglinear"},
    "recompute": {"prox_logp_method": "recompute"},
    FORCED: {"prox_logp_method": "recompute", "recompute_every_token": True},
    DENSE: {"prox_logp_method": "loglinear"},
}
PARTS = ("align", "proximal_pass", "forward_backward", "optimizer", "metrics")
Row = dict[str, Any]


def actor_section(arguments: argparse.Namespace, **changes: Any) -> ActorSection:
    """The `actor` section all ways have in common."""
    return ActorSection(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        sequence_parallel=arguments.sequence_parallel,
        bf16=arguments.bf16,
        max_tokens_per_micro_batch=arguments.tokens,
        loss_chunk_tokens=arguments.chunk_tokens,
        recompute_granularity="full" if arguments.recompute else None,
        **changes,
    )


@dataclass
class Measurement:
    """One implementation, on this rank: seconds, processor seconds, parts and peak memory, each once a round."""

    run: Callable[[Clock], dict[str, float]]
    pipeline: Pipeline
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
            max_position_embeddings=max(
                arguments.tokens, arguments.prompt_tokens + arguments.response_tokens
            ),
        )
        model = ModelSection(hf_path="random", initialization="random")
        self.actor = Actor(section, model, shape, grid, temperature=1.0, seed=arguments.seed)
        self.actor.start_stage(Schedule(section.lr, 0.0, 0, "constant", 1000))
        self.batch = synthetic_batch(batch_shape, arguments.vocab, arguments.seed)
        self.layer = self.actor.pipeline
        self.dense = DensePipeline(self.actor.model, grid, self.layer.settings)
        self.rollout = RolloutSection(max_response_tokens=arguments.response_tokens)

    def rows(self) -> list[Row]:
        """Measure, gather, and make the rows of all cases; the same on every rank."""
        cases = {number: self._case(number) for number in self.arguments.mini_batches}
        turns = [measurement for case in cases.values() for measurement in case.values()]
        for number in range(self.arguments.warm_up + self.arguments.rounds):
            for turn in range(len(turns)):
                # Another one goes first every time.
                self._measure(turns[(turn + number) % len(turns)], keep=number >= self.arguments.warm_up)
        rows = [row for number, case in cases.items() for row in self._rows(number, self._gathered(case))]
        for row in rows[: len(METHODS)]:
            if (kind := {LOGLINEAR: Pipeline, DENSE: DensePipeline}.get(row["implementation"])) is not None:
                row |= self._memory(kind)
        return rows

    def _case(self, num_mini_batches: int) -> dict[str, Measurement]:
        sections = {
            name: actor_section(self.arguments, num_mini_batches=num_mini_batches, **switches)
            for name, switches in METHODS.items()
        }
        steps = {
            name: Measurement(self._step(section), self.dense if name == DENSE else self.layer)
            for name, section in sections.items()
        }
        aligned = align(self.batch, sections[LOGLINEAR], self.rollout)
        packs = [self.actor.pack(mini_batch) for mini_batch in aligned]
        method = Method.of(sections[LOGLINEAR])
        return steps | {
            FORWARD: Measurement(self._forward(packs), self.layer),
            PROXIMAL: Measurement(self._proximal(packs), self.layer),
            BARE: Measurement(self._bare(packs, method), self.layer),
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

    def _proximal(self, packs: list[list[MicroBatch]]) -> Callable[[Clock], dict[str, float]]:
        """What `loglinear` adds to a step: the interpolation of every trained token, and nothing else."""
        fields = [micro_batch.fields for pack in packs for micro_batch in pack]

        def run(clock: Clock) -> dict[str, float]:
            with clock("proximal_pass"):
                for each in fields:
                    interpolate(each.behave_logp, each.behave_logp, each.staleness, "loglinear")
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
        self.actor.pipeline = measurement.pipeline
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

    def _memory(self, kind: type[Pipeline]) -> Row:
        """What the last stage holds, in MB of 1024 squared, and the longest sequence that fits."""
        arguments = self.arguments
        share = arguments.prompt_tokens / (arguments.prompt_tokens + arguments.response_tokens)
        objective = Method.of(actor_section(arguments, **METHODS[LOGLINEAR])).objective(0)
        lengths = (arguments.tokens // 2, arguments.tokens)
        sequences = [lone_sequence(length, share, arguments.vocab) for length in lengths]
        found: Peaks = measure_peaks(self.actor, kind, objective, sequences)
        return {
            "lengths": found.lengths,
            "last_stage_held_mb": found.held / 2**20,
            "last_stage_mb": [peak / 2**20 for peak in found.peaks],
            "longest_sequence": found.longest(arguments.memory_gb * 2**30),
        }

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
        for name in (*METHODS, FORWARD, PROXIMAL):
            row = _row(base, name, found[name], found[LOGLINEAR])
            passes = None if name in (DENSE, PROXIMAL) else row["forwards_per_token"]
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
