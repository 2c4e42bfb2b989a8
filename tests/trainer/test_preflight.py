"""What the pre-flight concludes from the nodes' reports; on a real Slurm: tests/slurm/test_bad_nodes.py."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest

from megatron_a3po.trainer.preflight import gpu_problems, judge, main, meet, report, versions

NODES = ["a", "b", "c"]


def reported(folder: Path, node: str, **changes: str) -> None:
    found = {"node": node, "versions": versions() | changes, "problems": []}
    (folder / f"{node}.json").write_text(json.dumps(found))


def test_good_nodes_in_their_order(tmp_path: Path) -> None:
    for node in NODES:
        assert report(tmp_path, node, num_gpus=0) == 0
    assert judge(tmp_path, NODES, wanted=2, within_s=0) == 0
    assert (tmp_path / "good").read_text() == "a,b,c"


def test_every_kind_of_bad_node_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported(tmp_path, "a")
    reported(tmp_path, "b", torch="1.0")
    reported(tmp_path, "d")
    broken = {"node": "e", "versions": versions(), "problems": ["GPU 3 fails (ECC)"]}
    (tmp_path / "e.json").write_text(json.dumps(broken))
    assert judge(tmp_path, ["a", "b", "c", "d", "e"], wanted=2, within_s=0) == 0
    said = capsys.readouterr().out
    assert f"bad node b: torch is 1.0, on most nodes {versions()['torch']}" in said
    assert f"bad node c: no report in {tmp_path}" in said
    assert "bad node e: GPU 3 fails (ECC)" in said
    assert (tmp_path / "good").read_text() == "a,d"

    assert judge(tmp_path, ["a", "b", "c"], wanted=2, within_s=0) == 3
    assert "1 of 3 nodes passed, 2 are wanted" in capsys.readouterr().out


def test_a_folder_that_is_not_shared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "elsewhere")]) == 3
    assert f"cannot write to {tmp_path / 'elsewhere'}" in capsys.readouterr().out


def test_gpus_are_looked_at_where_they_are_wanted() -> None:
    assert gpu_problems(0) == []
    assert gpu_problems(1000)[0].endswith("GPUs, wanted 1000")


def test_gpus_are_those_that_the_task_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "a")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1000")
    assert main(["report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["problems"][0].endswith("GPUs, wanted 1000")


def one_of_two(rank: int, port: int, folder: Path, within_s: float) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": NODES[rank],
    }
    said = (folder / f"said-{rank}").open("w")
    os.dup2(said.fileno(), 1)
    os._exit(meet("127.0.0.1", folder / "shared", NODES[:2], within_s))


def met(folder: Path, present: list[int], within_s: float) -> tuple[set[int | None], list[str]]:
    """The exit codes of those who are there, and what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, port, folder, within_s)) for rank in present]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return {process.exitcode for process in processes}, [
        (folder / f"said-{rank}").read_text() for rank in present
    ]


def test_nodes_meet(tmp_path: Path) -> None:
    assert met(tmp_path, [0, 1], within_s=300) == ({0}, ["", ""])


def test_nodes_that_do_not_come_are_missed(tmp_path: Path) -> None:
    assert met(tmp_path, [0], within_s=1) == ({3}, ["bad node b: did not come within 1 s\n"])
    codes, (said,) = met(tmp_path, [1], within_s=1)
    assert codes == {3}
    assert said.startswith("bad node a: b cannot reach 127.0.0.1:")


def test_a_node_that_does_not_share_the_folder_is_named_by_all(tmp_path: Path) -> None:
    (tmp_path / "shared" / "b").mkdir(parents=True)  # in the way of its file
    codes, (one, other) = met(tmp_path, [0, 1], within_s=300)
    assert codes == {3}
    assert one == other
    assert one.startswith(f"bad node b: cannot write to {tmp_path / 'shared'} (Is a directory)")
