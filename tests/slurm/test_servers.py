"""Jobs with vLLM servers on a real Slurm. Where a job trains on batches from disk its servers are stand-ins for vLLM;
where it generates they are real ones."""

import contextlib
import shutil
from pathlib import Path

import pytest

from tests.rollout.tiny import tiny_tokenizer
from tests.slurm.cluster import variables_of
from tests.slurm.site import HELD, ROOT, TP2, Site, in_the_middle, let_go
from tests.trainer.replay import logs_of
from tests.trainer.test_resume import num_rows, step_of
from tests.vllm_server import NO_VLLM, START_S, vllm_python, write_version
from tests.vllm_stand_in import write_stand_in


@pytest.fixture(scope="module")
def stand_in(site: Site) -> str:
    """An interpreter in whose environment vLLM starts at once."""
    root = site.runs.folder / "stand-in"
    write_stand_in(root)
    return site.program("python-with-stand-in", f"export PYTHONPATH=$PYTHONPATH:{root}\n")


NOTED = """#!/bin/sh
# There is no enroot here: what would be asked of it is noted, and the rest is done.
printf '%s\\n' "$*" >>{file}
for argument; do
    shift
    case $argument in --container-*) ;; *) set -- "$@" "$argument" ;; esac
done
exec {srun} "$@"
"""


def in_containers(site: Site, script: str) -> tuple[Path, Path, str]:
    """The script with containers in its block, where every srun is noted, and the PATH on which that happens."""
    text = (ROOT / "slurm" / script).read_text()
    for given, edited in (
        ("STEP_OPTIONS=()", "STEP_OPTIONS=(--container-image=trainer.sqsh --container-mounts=/shared)"),
        ("SERVER_OPTIONS=(--exact)", "SERVER_OPTIONS=(--exact --container-image=vllm.sqsh)"),
    ):
        assert given in text
        text = text.replace(given, edited)
    path, folder = site.slurm.environment()["PATH"], site.runs.folder / "containers"
    folder.mkdir(exist_ok=True)
    noted, copy, srun = (folder / name for name in ("noted", script, "srun"))
    copy.write_text(text)
    srun.write_text(NOTED.format(file=noted, srun=shutil.which("srun", path=path)))
    srun.chmod(0o755)
    noted.write_text("")
    return copy, noted, f"{folder}:{path}"


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
    script, noted, path = in_containers(site, "train_servers.sbatch")
    job = site.start(
        str(script),
        [*options, "--ntasks-per-node=4"],
        argv,
        A3PO_VLLM_PYTHON=stand_in,
        PATH=path,
        UNNAMED="is in the job's environment",
        **changes,
    )
    job.wait_for(lambda: len(registered(run_dir)) == len(servers), "registered servers")
    in_the_middle(job, run_dir)
    assert sorted(site.nodes_of(job.tasks())) == trainers
    said = registered(run_dir)
    assert sorted(said) == [f"job-{job.number}-{number}" for number in range(len(servers))]
    assert not any("UNNAMED" in variables_of(pid) for pid in job.tasks()), "what the block names, and no more"
    assert all("attempt 1, node" in text for text in said.values())
    assert sorted(text.split("node ")[1].split(",")[0] for text in said.values()) == servers
    job.cancel("--batch", "--signal=USR2")
    assert job.wait() == ("FAILED", 75), site.told(job, name)
    assert "the servers have ended" in job.output()
    assert registered(run_dir) == {}
    logs = [log.read_text() for log in site.logs(job, 1).glob("*-server-*.log")]
    assert len(logs) == len(servers)
    assert all("ended, as it was asked to" in log for log in logs)
    of_servers = [line for line in noted.read_text().splitlines() if "server.sh" in line]
    of_trainer = [line for line in noted.read_text().splitlines() if "server.sh" not in line]
    assert len(of_servers) == 1
    assert "--container-image=vllm.sqsh" in of_servers[0]
    assert len(of_trainer) == 3  # the plan, how servers are started, the training
    assert all("--container-image=trainer.sqsh --container-mounts=/shared" in line for line in of_trainer)


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
    """What makes the tiny run one that generates on real servers."""
    if vllm_python() is None:
        pytest.skip(NO_VLLM)
    model = write_version(site.runs.folder / "model-for-vllm", seed=3)
    tiny_tokenizer().save_pretrained(model)
    return [
        f"model.hf_path={model}",
        "trainer.replay=null",
        "trainer.prompts_per_step=2",
        "rollout.max_concurrent_samples=16",
        "reward={type: function, path: 'tests.trainer.rewards:any_response'}",
        f"rollout.server_timeout_s={START_S}",
        *TP2,
    ]


def test_a_heterogeneous_job_with_a_real_server_is_requeued_and_ends_with_its_run(
    site: Site, generating: list[str]
) -> None:
    """The trainer waits for the server, trains, is told to stop, continues with a new server, is done."""
    name = "heterogeneous"
    run_dir = site.runs.folder / name
    options = ["--nodes=2", "--ntasks-per-node=1", ":", "--nodes=1", "--time=40"]
    argv = [*site.runs.argv(name, *generating, f"trainer.steps={HELD + 1}")[1:]]
    job = site.start("train_het.sbatch", options, argv, A3PO_VLLM_PYTHON=vllm_python() or "")
    job.wait_for(lambda: num_rows(run_dir) >= 2, "steps on the job's own server", START_S)
    (server,) = registered(run_dir)
    assert server == f"job-{job.number}-0"
    assert "attempt 1, node n2" in registered(run_dir)[server]
    assert {*site.nodes_of(job.tasks())} == {"n0", "n1"}

    job.cancel("--batch", "--signal=USR1")
    job.wait_for(lambda: job.restarts == 1, "the requeue", START_S)
    stopped_at = num_rows(run_dir)
    assert step_of(run_dir / "checkpoints" / f"step-{stopped_at}") == stopped_at
    assert registered(run_dir) == {}

    def has_begun() -> bool:
        site.slurm.stir()
        return job.state != "PENDING"

    job.wait_for(has_begun, "the second attempt")
    assert job.wait(START_S) == ("COMPLETED", 0), site.told(job, name)
    assert "stopped early; continues as attempt 2" in job.output()
    assert job.output().count("the servers have ended") == 2
    rows = site.runs.rows(name)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["attempt"] for row in rows] == [1] * stopped_at + [2] * (len(rows) - stopped_at)
    fence = run_dir / "servers" / f"{server}.attempt"
    assert fence.read_text().strip() == "2", "a server of the first attempt would end itself"
    assert registered(run_dir) == {}
    assert site.servers_of(job) == []
    for attempt in (1, 2):
        (log,) = site.logs(job, attempt).glob("*-server-*.log")
        assert "ended, as it was asked to" in log.read_text() or "the run is done" in log.read_text()


@pytest.mark.slow
def test_a_pool_of_real_servers_comes_and_goes(site: Site, generating: list[str]) -> None:
    name = "pooled"
    run_dir = site.runs.folder / name
    rollout_log = run_dir / "logs" / "rollout.log"

    def said(words: str) -> int:
        return rollout_log.read_text().count(words) if rollout_log.is_file() else 0

    def goes_on() -> None:
        so_far = num_rows(run_dir)
        job.wait_for(lambda: num_rows(run_dir) >= so_far + 2, "further steps", START_S)

    run_dir.mkdir()
    let_go(run_dir)
    argv = [*site.runs.argv(name, *generating, "trainer.steps=100000")[1:]]
    pool = site.start("pool.sbatch", ["--array=0-1"], [str(run_dir)], A3PO_VLLM_PYTHON=vllm_python() or "")
    options = ["--nodes=2", "--ntasks-per-node=1"]
    job = site.start("train_servers.sbatch", options, argv, A3PO_SERVERS_PER_NODE="0")
    job.wait_for(lambda: said(" serves version ") >= 2, "two servers with work", START_S)
    assert sorted(registered(run_dir)) == [f"job-{pool.number}_{task}-0" for task in (0, 1)]
    goes_on()
    site.slurm.command("scancel", f"{pool.number}_0")
    job.wait_for(lambda: said("is no longer named") >= 1, "a smaller pool", START_S)
    goes_on()
    assert list(registered(run_dir)) == [f"job-{pool.number}_1-0"]
    job.cancel("--batch", "--signal=USR2")
    assert job.wait(START_S) == ("FAILED", 75), site.told(job, name) + logs_of(run_dir)
    assert list(registered(run_dir)) == [f"job-{pool.number}_1-0"], "the pool outlives the trainer"
    pool.cancel()
    site.wait(lambda: registered(run_dir) == {} and site.servers_of(pool) == [], job)
