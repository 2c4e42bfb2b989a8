"""What the pre-flight concludes from the nodes' reports; its steps on a real Slurm are in tests/slurm/test_jobs.py."""

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
    assert (tmp_path / "good").read_text() == "a,b"


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


def one_of_two(rank: int, port: int, within_s: float) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os._exit(meet("127.0.0.1", within_s))


@pytest.mark.parametrize(("present", "code"), [([0, 1], 0), ([0], 3)])
def test_nodes_meet_or_are_missed(present: list[int], code: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    within_s = 60.0 if code == 0 else 2.0
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, port, within_s)) for rank in present]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == code
