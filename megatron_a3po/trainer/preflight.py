"""The pre-flight of a Slurm job: every node is tested before ranks are started on it, and bad ones are named.

    report FOLDER --gpus N            on every node at once: GPUs compute, the folder is there and writable, versions
    judge FOLDER --wanted N NODE ...  on one node: who did not report, has a problem or other versions; writes `good`
    meet ADDRESS                      on the good nodes at once: they reach each other, and a collective adds up

`slurm/job.sh` calls it in this order, with a folder in the run directory, which all nodes must share. Lines for a
person begin with `bad node NAME`. No configuration is read here.
"""

import argparse
import datetime
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_a3po
from megatron_a3po.environment import node_name, read_launch
from megatron_a3po.errors import EXIT_DONE, EXIT_NEEDS_PERSON

PACKAGES = ("torch", "megatron-core", "transformers")
MEET_WITHIN_S = 120.0
GOOD = "good"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three parts; 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m megatron_a3po.trainer.preflight")
    parts = parser.add_subparsers(dest="part", required=True)
    reporting = parts.add_parser("report")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--gpus", default="0", help="as Slurm says it: 8, or h100:8")
    judging = parts.add_parser("judge")
    judging.add_argument("folder", type=Path)
    judging.add_argument("--wanted", type=int, required=True)
    judging.add_argument("--within", type=float, required=True, metavar="SECONDS", help="to wait for reports")
    judging.add_argument("nodes", nargs="+")
    meeting = parts.add_parser("meet")
    meeting.add_argument("address")
    arguments = parser.parse_args(argv)
    match arguments.part:
        case "report":
            return report(arguments.folder, node_name(), int(arguments.gpus.rpartition(":")[2]))
        case "judge":
            return judge(arguments.folder, arguments.nodes, arguments.wanted, arguments.within)
        case _:
            return meet(arguments.address)


def report(folder: Path, node: str, num_gpus: int) -> int:
    """Write what this node has; the sentence goes to the log where not even that is possible."""
    found = {"node": node, "versions": versions(), "problems": gpu_problems(num_gpus)}
    file = folder / f"{node}.json"
    try:
        file.with_suffix(".tmp").write_text(json.dumps(found))
        file.with_suffix(".tmp").rename(file)
    except OSError as error:
        _say(f"bad node {node}: cannot write to {folder} ({error.strerror}): is it shared by all nodes?")
        return EXIT_NEEDS_PERSON
    return EXIT_DONE


def judge(folder: Path, nodes: Sequence[str], wanted: int, within_s: float) -> int:
    """Name the bad ones among `nodes`; write the first `wanted` good ones to <folder>/good, comma-separated."""
    deadline = time.monotonic() + within_s
    while len(list(folder.glob("*.json"))) < len(nodes) and time.monotonic() < deadline:
        time.sleep(0.2)
    reports = {node: _read(folder / f"{node}.json") for node in nodes}
    usual = _most_common([found["versions"] for found in reports.values() if found])
    problems = {node: _problems(reports[node], folder, usual) for node in nodes}
    for node in nodes:
        for problem in problems[node]:
            _say(f"bad node {node}: {problem}")
    good = [node for node in nodes if not problems[node]]
    if len(good) < wanted:
        _say(
            f"{len(good)} of {len(nodes)} nodes passed, {wanted} are wanted: ask for spare nodes, or mend these"
        )
        return EXIT_NEEDS_PERSON
    (folder / GOOD).write_text(",".join(good[:wanted]))
    return EXIT_DONE


def meet(address: str, within_s: float = MEET_WITHIN_S) -> int:
    """Reach the first node, wait for the others there, add up a number with them: over gloo, and NCCL with GPUs."""
    launched = read_launch()
    if launched.world_size is None or launched.world_size == 1:
        return EXIT_DONE
    import torch
    import torch.distributed as dist

    rank, size, node = launched.rank, launched.world_size, node_name()
    timeout = datetime.timedelta(seconds=within_s)
    assert launched.master_port is not None
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, launched.master_port, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )
    except (RuntimeError, OSError) as error:
        _say(f"bad node {node}: cannot reach {address}:{launched.master_port} ({_first_line(error)})")
        return EXIT_NEEDS_PERSON
    store.set(f"here/{rank}", node)
    try:
        store.wait([f"here/{other}" for other in range(size)], timeout)
    except RuntimeError:
        absent = [other for other in range(size) if not store.check([f"here/{other}"])]
        _say(f"bad: of {size} nodes those with the task numbers {absent} did not arrive")
        return EXIT_NEEDS_PERSON
    try:
        for backend in ("gloo", "nccl") if torch.cuda.is_available() else ("gloo",):
            apart = dist.PrefixStore(backend, store)  # pyright: ignore[reportPrivateImportUsage]
            _add_up(backend, apart, rank, size, timeout)
    except (RuntimeError, ValueError) as error:
        _say(f"bad node {node}: no collective with the others ({_first_line(error)})")
        return EXIT_NEEDS_PERSON
    return EXIT_DONE


def _add_up(backend: str, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
    """Errors: ValueError where the sum is wrong; what the backend raises."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    numbers = torch.full((1 << 16,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    found, wanted = numbers.unique().tolist(), size * (size + 1) / 2
    dist.destroy_process_group()
    if found != [wanted]:
        raise ValueError(f"the sum over {backend} is {found}, wanted {wanted}")


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    code = hashlib.sha256()
    root = Path(megatron_a3po.__file__).parent
    for file in sorted(root.rglob("*.py")):
        code.update(file.read_bytes())
    return found | {"megatron_a3po": code.hexdigest()[:12]}


def gpu_problems(wanted: int) -> list[str]:
    """What is wrong with this node's GPUs, where any are wanted."""
    if wanted == 0:
        return []
    import torch

    if (found := torch.cuda.device_count()) < wanted:
        return [f"torch sees {found} GPUs, wanted {wanted}"]
    problems = []
    for index in range(wanted):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{index}")
            right = bool(((ones @ ones) == 256).all())
        except RuntimeError as error:
            problems.append(f"GPU {index} fails ({_first_line(error)})")
        else:
            problems += [] if right else [f"GPU {index} multiplies wrongly"]
    return problems


def _problems(found: dict[str, Any] | None, folder: Path, usual: dict[str, str]) -> list[str]:
    if found is None:
        return [f"no report in {folder}: its step failed, or it does not share that folder"]
    others = [
        f"{name} is {text}, on most nodes {usual.get(name)}"
        for name, text in found["versions"].items()
        if text != usual.get(name)
    ]
    return [*found["problems"], *others]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _most_common(found: Sequence[dict[str, str]]) -> dict[str, str]:
    counts = Counter(json.dumps(one, sort_keys=True) for one in found)
    return json.loads(counts.most_common(1)[0][0]) if counts else {}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a process group that a lost node left hanging would hold the interpreter
