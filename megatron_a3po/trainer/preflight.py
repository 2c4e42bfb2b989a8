"""The pre-flight of a Slurm job: every node is tested before ranks are started on it, and bad ones are named.

    report FOLDER                     on every node at once: GPUs compute, the folder is there and writable, versions
    judge FOLDER --wanted N NODE ...  on one node: who did not report, has a problem or other versions; writes `good`
    meet ADDRESS FOLDER NODE,...      on the chosen nodes at once: they share the folder, reach each other, add up

`slurm/job.sh` calls it in this order: first with a folder beside the job's logs, then, once the configuration has told
where that is, with one in the run directory. Lines for a person begin with `bad node NAME:`. No configuration is read
here.
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
from megatron_a3po.environment import Launch, node_name, read_launch, slurm_variables
from megatron_a3po.errors import EXIT_DONE, EXIT_NEEDS_PERSON

PACKAGES = ("torch", "megatron-core", "transformers")
MEET_WITHIN_S = 120.0
SEEN_WITHIN_S = 60.0  # what one node writes shows on another, over a network file system
GOOD = "good"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three parts; 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m megatron_a3po.trainer.preflight")
    parts = parser.add_subparsers(dest="part", required=True)
    reporting = parts.add_parser("report")
    reporting.add_argument("folder", type=Path)
    judging = parts.add_parser("judge")
    judging.add_argument("folder", type=Path)
    judging.add_argument("--wanted", type=int, required=True)
    judging.add_argument("--within", type=float, required=True, metavar="SECONDS", help="to wait for reports")
    judging.add_argument("nodes", nargs="+")
    meeting = parts.add_parser("meet")
    meeting.add_argument("address", help="of the first node")
    meeting.add_argument("folder", type=Path)
    meeting.add_argument("nodes", help="that are to come, comma-separated")
    meeting.add_argument(
        "--within", type=float, default=MEET_WITHIN_S, metavar="SECONDS", help="to wait for all"
    )
    arguments = parser.parse_args(argv)
    match arguments.part:
        case "report":
            # What the task has, however it was asked for; without GPUs Slurm says nothing.
            return report(
                arguments.folder, node_name(), int(slurm_variables().get("SLURM_GPUS_ON_NODE") or 0)
            )
        case "judge":
            return judge(arguments.folder, arguments.nodes, arguments.wanted, arguments.within)
        case _:
            return meet(arguments.address, arguments.folder, arguments.nodes.split(","), arguments.within)


def report(folder: Path, node: str, num_gpus: int) -> int:
    """Write what this node has; the sentence goes to the log where not even that is possible."""
    found = {"node": node, "versions": versions(), "problems": gpu_problems(num_gpus)}
    problem = _write(folder, f"{node}.json", json.dumps(found))
    if problem:
        _say(f"bad node {node}: {problem}")
    return EXIT_NEEDS_PERSON if problem else EXIT_DONE


def judge(folder: Path, nodes: Sequence[str], wanted: int, within_s: float) -> int:
    """Name the bad ones among `nodes`; where `wanted` are good, write all good ones to <folder>/good."""
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
    (folder / GOOD).write_text(",".join(good))
    return EXIT_DONE


def meet(address: str, folder: Path, nodes: Sequence[str], within_s: float = MEET_WITHIN_S) -> int:
    """Reach the first node, wait for the others there, share `folder`, add up: over gloo, and NCCL on each GPU.

    The first node holds the store and says who is bad; where it is itself, the others say so.
    """
    launched, node = read_launch(), node_name()
    problem = _make(folder) or _write(folder, node)
    if launched.world_size is None or launched.world_size == 1:
        if problem:
            _say(f"bad node {node}: {problem}")
        return EXIT_NEEDS_PERSON if problem else EXIT_DONE
    import torch
    import torch.distributed as dist

    rank, size = launched.rank, launched.world_size
    timeout = datetime.timedelta(seconds=within_s)
    assert launched.master_port is not None
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, launched.master_port, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )
    except (RuntimeError, OSError) as error:
        _say(
            f"bad node {nodes[0]}: {node} cannot reach {address}:{launched.master_port} ({_first_line(error)})"
        )
        return EXIT_NEEDS_PERSON
    store.set(f"here/{rank}", json.dumps([node, problem, torch.cuda.device_count()]))
    bad, num_gpus = _bad_nodes(store, launched, folder, nodes, timeout)
    for name, what in bad.items():
        _say(f"bad node {name}: {what}")
    if bad:
        _leave(store, rank, size)
        return EXIT_NEEDS_PERSON
    try:
        for device in ["cpu", *(f"cuda:{index}" for index in range(num_gpus))]:
            apart = dist.PrefixStore(device, store)  # pyright: ignore[reportPrivateImportUsage]
            _add_up(torch.device(device), apart, rank, size, timeout)
    except (RuntimeError, ValueError) as error:
        _blame_first(store, node, _first_line(error))
        _leave(store, rank, size)
        return EXIT_NEEDS_PERSON
    return EXIT_DONE


def _bad_nodes(
    store: Any,
    launched: Launch,
    folder: Path,
    nodes: Sequence[str],
    timeout: datetime.timedelta,
) -> tuple[dict[str, str], int]:
    """Who did not come, came with a problem, or writes where the first node does not see it; and the number of GPUs
    that every node has. All nodes get the first one's answer."""
    if launched.rank == 0:
        there = _wait_for_all(store, launched.world_size or 1, timeout.total_seconds())
        found = {node: problem for node, problem, _ in there}
        bad = {
            node: f"did not come within {timeout.total_seconds():g} s" for node in nodes if node not in found
        }
        bad |= {node: what for node, what in found.items() if what}
        bad = bad or {
            node: f"what it writes to {folder} does not show on {node_name()}"
            for node in _not_seen(folder, nodes)
        }
        store.set("found", json.dumps([bad, min(num_gpus for _, _, num_gpus in there)]))
    try:
        store.wait(["found"], 2 * timeout + datetime.timedelta(seconds=SEEN_WITHIN_S))
        bad, num_gpus = json.loads(store.get("found"))
    except RuntimeError as error:
        return {nodes[0]: f"does not answer any more ({_first_line(error)})"}, 0
    return bad, num_gpus


def _wait_for_all(store: Any, size: int, within_s: float) -> list[tuple[str, str, int]]:
    """Node, problem and number of GPUs of each task; until all are there or the time is over."""
    found: list[tuple[str, str, int]] = []
    deadline = time.monotonic() + within_s
    missing = list(range(size))
    while missing and time.monotonic() < deadline:
        for rank in [one for one in missing if store.check([f"here/{one}"])]:
            found.append(json.loads(store.get(f"here/{rank}")))
            missing.remove(rank)
        time.sleep(0.1)
    return found


def _not_seen(folder: Path, nodes: Sequence[str]) -> list[str]:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (
        missing := [node for node in nodes if not (folder / node).exists()]
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    # With two it cannot be told who is alone.
    return [nodes[0]] if len(missing) == len(nodes) - 1 > 1 else missing


def _blame_first(store: Any, node: str, why: str) -> None:
    """A collective that fails on one node fails on all of them."""
    try:
        first = store.compare_set("failed", "", node).decode()
    except RuntimeError:
        first = "another"
    if first == node:
        _say(f"bad node {node}: no collective with the others ({why})")
    else:
        _say(f"no collective, after {first} had failed ({why})")


def _leave(store: Any, rank: int, size: int) -> None:
    """Rank 0, which holds the store, goes last, where the others come to it at all."""
    deadline = time.monotonic() + 5
    try:
        store.add("left", 1)
        while rank == 0 and store.add("left", 0) < size and time.monotonic() < deadline:
            time.sleep(0.1)
    except RuntimeError:
        return


def _add_up(device: Any, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
    """Errors: ValueError where the sum is wrong; what the backend raises."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    numbers = torch.full((1 << 16,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    found, wanted = numbers.unique().tolist(), size * (size + 1) / 2
    dist.destroy_process_group()
    if found != [wanted]:
        raise ValueError(f"the sum over {backend} on {device} is {found}, wanted {wanted}")


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
        return [f"no report in {folder}: its step failed or hung, or it does not share that folder"]
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


def _make(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make {folder} ({error.strerror})"
    return ""


def _write(folder: Path, name: str, text: str = "") -> str:
    """A file that is there as a whole; what is wrong, if that cannot be."""
    try:
        (folder / f"{name}.tmp").write_text(text)
        (folder / f"{name}.tmp").rename(folder / name)
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror}): is it shared by all nodes?"
    return ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a process group that a lost node left hanging would hold the interpreter
