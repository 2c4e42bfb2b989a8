"""What a training step costs: every way to have the proximal policy against `loglinear`, in one run.

All implementations share one process group, one model and one batch, and take turns in every round, so that what
disturbs the machine disturbs all alike; ratios are medians over rounds of times of the same round. `CPU ratio` is of
processor time over all ranks, which a busy machine disturbs less. Besides them run

    dense logits    `loglinear` with dense logits of all rows, Megatron-Core's cross-entropy and autograd for the loss
    proximal policy the interpolation of all trained tokens, by itself: what `loglinear` adds to a step
    one forward     scoring the whole batch: what a step of forced recompute should cost more than `loglinear`
    bare            forward-backward and optimizer of the same packs by Megatron-Core's own calls: what is not
                    this is the loop's overhead (align, packing, the finiteness check, metrics)

After the times, the last stage's memory with this layer and with dense logits, and the longest sequence that fits into
`--memory-gb`; `step_memory.py` says how that is reckoned.

It starts its own ranks on this machine: gloo, or NCCL where there are GPUs. Figures are in docs/benchmarks.md.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about what is not installed; `doctor` tells that in words
    from step_cases import DENSE, FORCED, FORWARD, LOGLINEAR, PARTS, PROXIMAL, Benchmark, Row, actor_section

    from megatron_a3po.actor.grid import build_grid, leave_grid

AIM_PERCENT = 0.1  # of a step, for the proximal policy as arithmetic


def main() -> int:
    arguments = _arguments()
    world_size = arguments.tp * arguments.pp
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as folder:
        torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            _rank, (world_size, arguments, Path(folder)), nprocs=world_size, start_method="fork"
        )
        rows = json.loads((Path(folder) / "rows.json").read_text())
    print(_heading(arguments))
    for table in (*_tables(rows), _memory_table(rows, arguments.memory_gb)):
        print(f"\n{table}")
    print("\n" + "\n".join(_headlines(rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _rank(rank: int, world_size: int, arguments: argparse.Namespace, folder: Path) -> None:
    """One rank's life; rank 0 leaves the rows in `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no dependence on the machine's host name
    section = actor_section(arguments)
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


def _headlines(rows: list[Row]) -> Iterator[str]:
    """What the proximal policy costs as arithmetic, and as a forward pass: measured, and predicted from one forward."""
    cases = dict.fromkeys(row["case"] for row in rows if row["implementation"] == FORCED)
    for case in cases:
        found = {row["implementation"]: row for row in rows if row["case"] == case}
        share, step = 100 * found[PROXIMAL]["ratio"], found[LOGLINEAR]["seconds"]
        yield (
            f"{case}: the proximal policy of loglinear takes {1000 * found[PROXIMAL]['seconds']:.2f} ms, "
            f"{share:.3f}% of a step (aim: below {AIM_PERCENT}%)"
        )
        passes = found[FORCED]["forwards_per_token"] - found[LOGLINEAR]["forwards_per_token"]
        measured, predicted = found[FORCED]["ratio"] - 1, passes * found[FORWARD]["ratio"]
        yield (
            f"{case}: forced recompute costs {measured * step:.3f} s of a step more, {100 * measured:.1f}%; "
            f"{passes:g} forward predicts {predicted * step:.3f} s, {100 * predicted:.1f}%"
        )


def _memory_table(rows: list[Row], memory_gb: float) -> str:
    """The last stage with this layer and with dense logits, in Markdown."""
    found = {row["implementation"]: row for row in rows if "longest_sequence" in row}
    shorter, longer = found[LOGLINEAR]["lengths"]
    titles = ["held MB", f"peak MB, {shorter} tokens", f"{longer} tokens", f"longest in {memory_gb:g} GB"]
    lines = [f"| last stage, one sequence | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for name, row in found.items():
        peaks = [f"{peak:.0f}" for peak in row["last_stage_mb"]]
        cells = [name, f"{row['last_stage_held_mb']:.0f}", *peaks, f"{row['longest_sequence']:,} tokens"]
        lines.append(f"| {' | '.join(cells)} |")
    times = found[DENSE]["longest_sequence"] / found[LOGLINEAR]["longest_sequence"]
    lines.append(
        f"\ndense logits: {found[DENSE]['ratio']:.3f} of the layer's time in a step "
        f"(CPU {found[DENSE]['cpu_ratio']:.3f}), {times:.2f} of its longest sequence"
    )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step times and memory of recompute, forced recompute and dense logits against loglinear.",
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
        "--chunk-tokens",
        default=None,
        help="tokens the loss layer projects at a time; left out, it chooses",
        **number,
    )
    parser.add_argument("--recompute", action="store_true", help="recompute all layers' activations")
    parser.add_argument(
        "--memory-gb", default=8.0, type=float, metavar="GB", help="what the longest sequence is to fit into"
    )
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
