"""What the loss layer costs, beside the bare three matrix products no head can do without, and beside other heads.

All heads share one process group and the same tensors, and take turns in every round, so that what disturbs the
machine disturbs all alike; ratios are medians over rounds of times of the same round. Wall time counts; processor time
(summed over ranks) is printed too, since it stands other work on the machine better. The weight has a main gradient, as
Megatron-Core gives it. Memory is measured apart, in one more call and without main gradient, as torch's allocator
counts it: all that is held beyond the inputs, over what must be (both gradients and one chunk of logits).

It starts its own ranks on this machine. Shapes are rows,hidden,vocabulary,shards,trained share. Figures are in
docs/loss_layer.md.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads would not live on in the forked ranks

import torch
import torch.distributed as dist
from peak_memory import peak_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about what is not installed
    from loss_heads import FLOOR, HEADS, LAYER, HeadProblem, Work
    from megatron.core import parallel_state

from megatron_a3po.vocab_parallel import TokenFields, TrainedRows, choose_chunk_tokens

CASES = (
    "2048,1024,32768,1,1.0",
    "512,1024,32768,1,1.0",
    "512,1024,32768,1,0.5",
    "1024,512,32768,1,1.0",
    "512,1024,32768,2,1.0",
    "256,512,151936,1,1.0",
)
ALONE = "this layer, one shard alone"
DENSE = "dense logits, Megatron-Core"
HALF = "half the tokens masked"
AIMS = {LAYER: 1.06, "this layer, entropy term": 1.12}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A shape."""

    rows: int
    hidden: int
    vocab: int
    shards: int
    trained: float

    @classmethod
    def parse(cls, text: str) -> "Case":
        """rows,hidden,vocabulary,shards,trained share."""
        rows, hidden, vocab, shards, trained = text.split(",")
        return cls(int(rows), int(hidden), int(vocab), int(shards), float(trained))

    def __str__(self) -> str:
        return f"T {self.rows} H {self.hidden} V {self.vocab} p {self.shards} trained {self.trained:g}"

    def problem(
        self, rank: int, shards: int, group: Any, device: torch.device, dtype: torch.dtype
    ) -> HeadProblem:
        """This rank's share, of as many shards."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.rows, self.hidden, generator=generator)
        weight = torch.randn(self.vocab, self.hidden, generator=generator) / self.hidden**0.5 * 2
        shard: Any = weight.chunk(shards)[rank].to(device, dtype).requires_grad_()
        shard.main_grad = torch.zeros_like(shard, dtype=torch.float32)
        count = int(self.rows * self.trained)
        chosen = torch.randperm(self.rows, generator=generator)[:count].sort().values
        fields = TokenFields(
            labels=torch.randint(0, self.vocab, (count,), generator=generator),
            behave_logp=-12 + torch.randn(count, generator=generator),
            staleness=torch.randint(0, 9, (count,), generator=generator).int(),
            advantages=torch.randn(count, generator=generator),
            loss_weights=torch.ones(count),
        )
        moved = {k: v.to(device) for k, v in vars(fields).items() if isinstance(v, torch.Tensor)}
        return HeadProblem(
            hidden.to(device, dtype).requires_grad_(),
            shard,
            TrainedRows(chosen.to(device), (count,)),
            replace(fields, **moved),
            self.vocab,
            choose_chunk_tokens(self.hidden, len(shard), device),
            group if shards > 1 else None,
        )


@dataclass
class Measured:
    """One head on one case, on this rank."""

    work: Work
    problem: HeadProblem
    alone: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak: int = 0


def main() -> int:
    arguments = _arguments()
    cases = [Case.parse(text) for text in arguments.cases]
    world_size = max(case.shards for case in cases)
    with tempfile.TemporaryDirectory(prefix="benchmark-loss-") as folder:
        torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            _rank, (world_size, arguments, cases, folder), nprocs=world_size, start_method="fork"
        )
        rows = json.loads((Path(folder) / "rows.json").read_text())
    print(_heading(arguments))
    print(_table(rows))
    print(_headlines(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.plot:
        _plot(rows, arguments.plot)
    return 0


def _rank(rank: int, world_size: int, arguments: argparse.Namespace, cases: list[Case], folder: str) -> None:
    """One rank's life; rank 0 leaves the rows in `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    rows = [row for case in cases for row in _run_case(case, rank, world_size, arguments, device)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _run_case(
    case: Case, rank: int, world_size: int, arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.shards)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    measured: dict[str, Measured] = {}
    left_out: dict[str, str] = {}
    group = dist.group.WORLD
    if rank < case.shards:
        problem = case.problem(rank, case.shards, group, device, dtype)
        for name in (FLOOR, *(name for name in HEADS if name in arguments.heads and name != FLOOR)):
            work = HEADS[name](problem)
            if isinstance(work, str):
                left_out[name] = work
            else:
                measured[name] = Measured(work, problem)
    if case.shards > 1 and rank == 0:
        whole = case.problem(0, 1, None, device, dtype)
        for name, head in ((ALONE, LAYER), (f"{FLOOR}, one shard alone", FLOOR)):
            measured[name] = Measured(_work(HEADS[head](whole)), whole, alone=True)
    names = [list(measured) if rank == 0 else None]
    dist.broadcast_object_list(names, src=0)
    for number in range(arguments.warm_up + arguments.rounds):
        order = names[0] or []
        for turn in range(len(order)):
            name = order[(turn + number) % len(order)]
            _measure(measured.get(name), keep=number >= arguments.warm_up, device=device)
    for name in names[0] or []:
        dist.barrier()
        if (one := measured.get(name)) is not None:
            one.problem.weight.main_grad = None
            one.problem.workspace.release()
            one.peak = peak_bytes(one.work, device)
            _forget_gradients(one)
    parallel_state.destroy_model_parallel()
    return _rows(case, measured, left_out, names[0] or [], world_size)


def _work(work: Work | str) -> Work:
    assert not isinstance(work, str)
    return work


def _measure(one: Measured | None, *, keep: bool, device: torch.device) -> None:
    dist.barrier()
    if one is not None:
        start, cpu_start = time.monotonic(), time.process_time()
        one.work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if keep:
            one.seconds.append(time.monotonic() - start)
            one.cpu_seconds.append(time.process_time() - cpu_start)
        _forget_gradients(one)


def _forget_gradients(one: Measured) -> None:
    one.problem.hidden.grad = one.problem.weight.grad = None


def _rows(
    case: Case, measured: dict[str, Measured], left_out: dict[str, str], names: list[str], world_size: int
) -> list[Row]:
    own = {name: (one.seconds, one.cpu_seconds, one.peak) for name, one in measured.items()}
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, own)
    if dist.get_rank() != 0:
        return []
    found = {}
    for name in names:
        ranks = [rank[name] for rank in everyone if name in rank]
        found[name] = (
            [max(times) for times in zip(*(rank[0] for rank in ranks), strict=True)],
            [sum(times) for times in zip(*(rank[1] for rank in ranks), strict=True)],
            max(rank[2] for rank in ranks),
        )
    rows = []
    for name, (seconds, cpu_seconds, peak) in found.items():
        floor = found[f"{FLOOR}, one shard alone" if name == ALONE else FLOOR]
        rows.append(
            {
                "case": str(case),
                "implementation": name,
                "seconds": statistics.median(seconds),
                "ratio": _paired(seconds, floor[0]),
                "cpu_seconds": statistics.median(cpu_seconds),
                "cpu_ratio": _paired(cpu_seconds, floor[1]),
                "peak_mb": peak / 1e6,
                "memory": peak / _least_bytes(measured[name].problem),
                "rounds": len(seconds),
            }
        )
        if name in (LAYER, DENSE):
            rows[-1]["tokens_in_8_gb"] = _tokens_in(8e9, peak, measured[name].problem, chunked=name == LAYER)
        if name == LAYER and ALONE in found:
            rows[-1]["total_work"] = _paired(cpu_seconds, found[ALONE][1])
    return rows + [
        {"case": str(case), "implementation": name, "left_out": why} for name, why in left_out.items()
    ]


def _least_bytes(problem: HeadProblem) -> int:
    """Both gradients, and one chunk of logits."""
    hidden, weight = problem.hidden, problem.weight
    return hidden.element_size() * hidden.numel() + _chunk_bytes(problem) + 4 * weight.numel()


def _chunk_bytes(problem: HeadProblem, chunk_tokens: int | None = None) -> int:
    number = -(-problem.rows.total // problem.chunk_tokens)
    tokens = chunk_tokens or -(-problem.rows.total // number)
    return problem.hidden.element_size() * tokens * len(problem.weight)


def _tokens_in(memory: float, peak: int, problem: HeadProblem, *, chunked: bool) -> int:
    """Rows whose head fits in `memory` beside the weight gradient: what grows with them was measured, all of it for
    dense logits, all but a chunk, which then has its full size, for this layer."""
    chunk, full_chunk = _chunk_bytes(problem), _chunk_bytes(problem, problem.chunk_tokens)
    growing = peak - 4 * problem.weight.numel() - (chunk if chunked else 0)
    return int((memory - (full_chunk if chunked else 0)) / (growing / len(problem.hidden)))


def _paired(times: list[float], floor: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, floor, strict=True))


def _heading(arguments: argparse.Namespace) -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    load = " ".join(f"{number:.1f}" for number in os.getloadavg())
    return (
        f"{datetime.date.today()}, torch {torch.__version__}, {where}, {os.cpu_count()} cores, one thread a rank, "
        f"{'bf16' if arguments.bf16 else 'fp32'}, median of {arguments.rounds} rounds, load average {load}"
    )


def _table(rows: list[Row]) -> str:
    lines, last = [], None
    for row in rows:
        if row["case"] != last:
            last = row["case"]
            head = ("seconds", "ratio", "cpu s", "cpu ratio", "peak MB", "memory")
            lines += ["", last, "  " + " " * 32 + "".join(f"{title:>12}" for title in head)]
        if "left_out" in row:
            lines.append(f"  {row['implementation']:32}  left out: {row['left_out']}")
            continue
        keys = ("seconds", "ratio", "cpu_seconds", "cpu_ratio", "peak_mb", "memory")
        digits = (3, 3, 3, 3, 1, 2)
        numbers = "".join(f"{row[key]:12.{n}f}" for key, n in zip(keys, digits, strict=True))
        lines.append(f"  {row['implementation']:32}{numbers}")
    return "\n".join(lines)


def _headlines(rows: list[Row]) -> str:
    """The worst ratios, and what the aims compare across cases."""
    lines = [""]
    for name, aim in AIMS.items():
        ours = [row for row in rows if row["implementation"] == name]
        for key in ("ratio", "cpu_ratio") if ours else ():
            worst = max(ours, key=lambda row: row[key])
            lines.append(f"worst {key} of {name}: {worst[key]:.3f} (aim {aim}) at {worst['case']}")
    ours = {row["case"]: row for row in rows if row["implementation"] == LAYER}
    for case, row in ours.items():
        full = ours.get(case.replace("trained 0.5", "trained 1"))
        if "trained 0.5" in case and full:
            lines.append(
                f"{HALF}: {row['cpu_seconds'] / full['cpu_seconds']:.3f} of the time (aim 0.55), {case}"
            )
        for other in (r for r in rows if r["case"] == case and r["implementation"] == DENSE):
            longest = [f"{r['tokens_in_8_gb']:,}" for r in (row, other)]
            lines.append(f"tokens in 8 GB: {longest[0]}, dense {longest[1]}, {case}")
        if "total_work" in row:
            lines.append(f"total work of the ranks: {row['total_work']:.3f} x one rank's (aim 1.05), {case}")
    return "\n".join(lines)


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "left_out" not in row and "alone" not in row["implementation"]]
    cases = list(dict.fromkeys(row["case"] for row in shown))
    # On a CPU, processor time: other work on the machine disturbs it least.
    on_gpu = torch.cuda.is_available()
    clock = ("ratio", "time / three products") if on_gpu else ("cpu_ratio", "processor time / three products")
    figure, axes = pyplot.subplots(len(cases), 2, figsize=(11, 2.3 * len(cases)), squeeze=False)
    for (times, memory), case in zip(axes, cases, strict=True):
        of_case = [row for row in shown if row["case"] == case][::-1]
        names = [row["implementation"] for row in of_case]
        colours = ["tab:orange" if name.startswith("this layer") else "tab:gray" for name in names]
        for axis, key, label in ((times, *clock), (memory, "peak_mb", "peak MB")):
            bars = axis.barh(names, [row[key] for row in of_case], color=colours)
            axis.bar_label(bars, fmt="%.0f" if key == "peak_mb" else "%.2f", fontsize=7)
            axis.set_title(f"{case}: {label}", fontsize=8)
            axis.tick_params(labelsize=7)
        times.axvline(1.0, color="black", linewidth=0.8)
        memory.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="rows,hidden,vocabulary,shards,share")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS), metavar="HEAD")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before (default: 1)")
    parser.add_argument("--bf16", action="store_true", help="hidden states and weight in bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw times and memory there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
