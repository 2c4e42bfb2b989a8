"""Jobs with vLLM servers on a real Slurm. Where a job trains on batches from disk its servers are stand-ins for vLLM;
where it generates they are real ones."""

import contextlib
from pathlib import Path

import pytest

from tests.rollout.tiny import tiny_tokenizer
from tests.slurm.cluster import Job
from tests.slurm.site import TP2, Site, in_the_middle
from tests.trainer.replay import logs_of
from tests.vllm_server import NO_VLLM, START_S, vllm_python, write_version
from tests.vllm_stand_in import write_stand_in


@pytest.fixture(scope="module")
def stand_in(site: Site) -> str:
    """An interpreter in whose environment vLLM starts at once."""
    root = site.runs.folder / "stand-in"
    write_stand_in(root)
    return site.program("python-with-stand-in", f"export PYTHONPATH=$PYTHONPATH:{root}\n")


def registered(run_dir: Path) -> dict[str, str]:
    """Name -> what a server has written."""
    said: dict[str, str] = {}
    for file in (run_dir / "servers").glob("*.url"):
        with contextlib.suppress(FileNotFoundError):  # gone in this moment
            said[file.stem] = file.read_text()
    return said


@pytest.mark.parametrize(
    ("options", "changes", "trainers", "servers"),
    [
        (["--nodes=1", "--ntasks=4"], {"A3PO_TASKS_PER_NODE": "2"}, ["n0", "n0"], ["n0"]),
        (["--nodes=3"], {"A3PO_SERVER_NODES": "1", "A3PO_SERVERS_PER_NODE": "2"}, ["n0", "n1"], ["n2", "n2"]),
    ],
    ids=["one-node", "split"],
)
def test_servers_in_a_plain_job(
    site: Site,
    stand_in: str,
    options: list[str],
    changes: dict[str, str],
    trainers: list[str],
    servers: list[str],
) -> None:
    name = f"servers-{len(servers)}"
    run_dir = site.runs.folder / name
    argv = [*site.runs.argv(name)[1:], *TP2]
    job = site.start(
        "train_servers.sbatch",
        [*options, "--ntasks-per-node=4"],
        argv,
        A3PO_VLLM_PYTHON=stand_in,
        **changes,
    )
    job.wait_for(lambda: len(registered(run_dir)) == len(servers), "registered servers")
    in_the_middle(job, run_dir)
    assert sorted(site.nodes_of(job.tasks())) == trainers
    said = registered(run_dir)
    assert sorted(said) == [f"job-{job.number}-{number}" for number in range(len(servers))]
    assert all("attempt 1, node" in text for text in said.values())
    assert sorted(text.split("node ")[1].split(",")[0] for text in said.values()) == servers
    job.cancel("--batch", "--signal=USR2")
    assert job.wait() == ("FAILED", 75), site.told(job, name)
    assert "the servers have ended" in job.output()
    assert registered(run_dir) == {}
    logs = [log.read_text() for log in site.logs(job, 1).glob("*-server-*.log")]
    assert len(logs) == len(servers)
    assert all("ended, as it was asked to" in log for log in logs)


def test_a_pool_comes_and_goes_and_ends_with_the_run(site: Site, stand_in: str) -> None:
    """Every task of an array is a server: it waits for a run to begin, leaves when it is cancelled, comes back after
    its time limit, ends with the run."""
    run_dir = site.runs.folder / "pool"
    argv = [*site.runs.argv("pool")[1:], *TP2]
    train = "train_servers.sbatch", ["--nodes=2", "--ntasks-per-node=1"], argv
    pool = site.start("pool.sbatch", ["--array=0-2"], [str(run_dir)], A3PO_VLLM_PYTHON=stand_in)
    names = [f"job-{pool.number}_{task}-0" for task in range(3)]
    assert registered(run_dir) == {}
    job = site.start(*train, A3PO_SERVERS_PER_NODE="0")
    in_the_middle(job, run_dir)
    job.cancel("--batch", "--signal=USR2")
    assert job.wait() == ("FAILED", 75), site.told(job, "pool")
    site.wait(lambda: sorted(registered(run_dir)) == names, pool)

    site.slurm.command("scancel", f"{pool.number}_1")
    site.wait(lambda: sorted(registered(run_dir)) == [names[0], names[2]], pool)
    more = site.start("pool.sbatch", ["--array=7"], [str(run_dir)], A3PO_VLLM_PYTHON=stand_in)
    site.wait(lambda: f"job-{more.number}_7-0" in registered(run_dir), more)
    site.slurm.command("scancel", "--batch", "--signal=USR1", f"{pool.number}_2")  # near its time limit
    site.wait(lambda: "attempt 2" in registered(run_dir).get(names[2], ""), pool)
    assert "Restarts=0" in site.record_of(f"{pool.number}_0"), "the others were not requeued with it"
    assert "JobState=CANCELLED" in site.record_of(f"{pool.number}_1")

    assert site.start(*train, A3PO_SERVERS_PER_NODE="0").wait() == ("COMPLETED", 0), logs_of(run_dir)
    assert more.wait() == ("COMPLETED", 0), more.said()
    site.wait(lambda: registered(run_dir) == {}, pool)


@pytest.fixture(scope="module")
def generating(site: Site) -> list[str]:
    """What makes the tiny run one that generates on real servers, for as long as it is let."""
    if vllm_python() is None:
        pytest.skip(NO_VLLM)
    model = write_version(site.runs.folder / "model-for-vllm", seed=3)
    tiny_tokenizer().save_pretrained(model)
    return [
        f"model.hf_path={model}",
        "trainer.replay=null",
        "trainer.steps=100000",
        "trainer.save_every=1000",
        "rollout.max_concurrent_samples=16",
        f"rollout.server_timeout_s={START_S}",
        "reward={type: function, path: 'tests.trainer.rewards:any_response'}",
        *TP2,
    ]


def rows(run_dir: Path) -> list[str]:
    file = run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def goes_on(job: Job, run_dir: Path, steps: int = 2) -> None:
    so_far = len(rows(run_dir))
    job.wait_for(lambda: len(rows(run_dir)) >= so_far + steps, "further steps", START_S)


@pytest.mark.slow
def test_a_heterogeneous_job_and_a_pool_of_real_servers(site: Site, generating: list[str]) -> None:
    """Trainer and server as one job; a pool comes and goes; the job is requeued while the pool stays."""
    name, python = "generating", vllm_python() or ""
    run_dir = site.runs.folder / name
    rollout_log = run_dir / "logs" / "rollout.log"

    def serving() -> int:
        return rollout_log.read_text().count(" serves version ") if rollout_log.is_file() else 0

    argv = [*site.runs.argv(name, *generating)[1:]]
    options = ["--nodes=2", "--ntasks-per-node=1", ":", "--nodes=1", "--time=40"]
    job = site.start("train_het.sbatch", options, argv, A3PO_VLLM_PYTHON=python)
    job.wait_for(lambda: len(rows(run_dir)) >= 2, "steps on the job's own server", START_S)
    assert list(registered(run_dir)) == [f"job-{job.number}-0"]
    assert "node n2" in registered(run_dir)[f"job-{job.number}-0"]

    pool = site.start("pool.sbatch", ["--array=0-1"], [str(run_dir)], A3PO_VLLM_PYTHON=python)
    job.wait_for(lambda: serving() >= 3, "three servers with work", START_S)
    goes_on(job, run_dir)
    site.slurm.command("scancel", f"{pool.number}_0")
    job.wait_for(lambda: "is no longer named" in rollout_log.read_text(), "a smaller pool")
    assert sorted(registered(run_dir)) == [f"job-{job.number}-0", f"job-{pool.number}_1-0"]
    goes_on(job, run_dir)

    job.cancel("--batch", "--signal=USR1")
    job.wait_for(
        lambda: '"attempt": 2' in "".join(rows(run_dir)[-1:]), "steps of the second attempt", START_S
    )
    assert job.restarts == 1
    assert "stopped early; continues as attempt 2" in job.output()
    assert "the servers have ended" in job.output()
    fence = run_dir / "servers" / f"job-{job.number}-0.attempt"
    assert fence.read_text().strip() == "2", "a server of the first attempt would end itself"
    goes_on(job, run_dir)
    job.cancel("--batch", "--signal=USR2")
    assert job.wait() == ("FAILED", 75), site.told(job, name) + logs_of(run_dir)
    assert list(registered(run_dir)) == [f"job-{pool.number}_1-0"]
    pool.cancel()
    site.wait(lambda: registered(run_dir) == {}, job)
    site.wait(lambda: site.servers_of(pool) + site.servers_of(job) == [], job)
