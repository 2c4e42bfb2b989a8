"""Who submits jobs in the tests here: a cluster, a tiny run, and what the scripts take from their environment."""

from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import PATIENCE_S, Cluster, Job, command_line_of, variables_of, wait_for
from tests.trainer.held import GOES_ON
from tests.trainer.replay import Replays, Rows, Weights, identical, logs_of, without_times
from tests.trainer.test_resume import num_rows

ROOT = Path(__file__).parent.parent.parent
STEPS, EVERY = 40, 10
TP2 = ["actor.tensor_model_parallel_size=2"]
TP2_PP2 = [*TP2, "actor.pipeline_model_parallel_size=2"]
MIDDLE = EVERY + 2
HELD = 2 * EVERY  # before which step a first attempt stands still until it is told to stop, or `let_go`


class Site:
    """Submits the scripts of `slurm/`, and knows what their jobs leave."""

    def __init__(self, slurm: Cluster, runs: Replays, variables: dict[str, str]) -> None:
        self.slurm, self.runs, self.variables = slurm, runs, variables

    def submit(self, name: str, *options: str, ranks: int = 2, **changes: str) -> Job:
        """A job of `ranks` ranks over two nodes, by default one on each; `changes` go into its environment."""
        layout = TP2_PP2 if ranks == 4 else TP2
        nodes = ["--nodes=2", f"--ntasks-per-node={ranks // 2}"]
        return self.start(
            "train_nodes.sbatch", [*nodes, *options], [*self.runs.argv(name)[1:], *layout], **changes
        )

    def start(self, script: str, options: list[str], argv: list[str], **changes: str) -> Job:
        options = [f"--chdir={self.runs.folder}", "--time=40", *options]
        variables = self.variables | changes
        return self.slurm.submit(ROOT / "slurm" / script, *options, "--", *argv, variables=variables)

    def program(self, name: str, text: str) -> str:
        """A stand-in for the site's Python, a shell script."""
        file = self.runs.folder / name
        python = self.variables["A3PO_PYTHON"]
        file.write_text("#!/bin/sh\n" + text.format(python=python) + f'exec {python} "$@"\n')
        file.chmod(0o755)
        return str(file)

    def logs(self, job: Job, attempt: int) -> Path:
        return self.runs.folder / "logs" / f"job-{job.number}" / f"attempt-{attempt}"

    def take_over(self, job: Job, attempt: int) -> str:
        """What an attempt said of the one before it."""
        file = self.logs(job, attempt) / "take-over.log"
        return file.read_text() if file.is_file() else ""

    def nodes_of(self, pids: list[int]) -> list[str]:
        """The node of each process."""
        return [variables_of(pid)["SLURMD_NODENAME"] for pid in pids]

    def servers_of(self, job: Job) -> list[int]:
        """The vLLM servers of a job, or of all tasks of an array; not who tends them."""
        return [
            pid
            for pid in self.slurm.members()
            if str(job.number) in map(variables_of(pid).get, ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"))
            and "-m a3po_vllm " in command_line_of(pid)
        ]

    def record_of(self, job: str) -> str:
        """What Slurm says of one task of an array."""
        return self.slurm.command("scontrol", "show", "job", "-o", job)

    def wait(self, condition: Callable[[], bool], job: Job, timeout_s: float = PATIENCE_S) -> None:
        """Until `condition` holds, whatever becomes of the job."""
        wait_for(condition, "something beside a job", job.said, timeout_s)

    def told(self, job: Job, name: str) -> str:
        """Everything about a job whose test failed."""
        return job.said() + logs_of(self.runs.folder / name)

    def has_continued(self, job: Job, name: str, straight: tuple[Rows, Weights]) -> list[int]:
        """Of a job that continued by itself: that it is done, once, with the numbers of the straight run. The attempt
        that each step is of."""
        assert job.wait() == ("COMPLETED", 0), self.told(job, name)
        assert job.restarts == 1, self.told(job, name)
        rows = self.runs.rows(name)
        assert without_times(rows) == without_times(straight[0])
        assert identical(self.runs.weights(name), straight[1])
        return [row["attempt"] for row in rows]


def in_the_middle(job: Job, run_dir: Path) -> None:
    first = run_dir / "checkpoints" / f"step-{EVERY}"  # which is written while the steps go on
    job.wait_for(
        lambda: num_rows(run_dir) >= MIDDLE and first.is_dir(), "a step after the first checkpoint, and that"
    )


def let_go(run_dir: Path) -> None:
    (run_dir / GOES_ON).touch()


def doctor(site: Site, job: Job) -> str:
    """How the job stands, in words."""
    program = [site.variables["A3PO_PYTHON"], "-m", "megatron_a3po", "doctor", "--slurm", str(job.number)]
    return site.slurm.command(*program, variables=site.variables)
