"""A real Slurm on this machine: controller, munge and several emulated nodes, everything in one temporary folder.

The daemons run in the foreground as children and are ended by their ids; whatever a job leaves behind is found by the
cluster's own SLURM_CONF in its environment. All "nodes" share this machine's files, ports and CPUs. What a job is
made of is in `slurm/`; the fixture is in `conftest.py`.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from megatron_a3po.lifetime import end_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PACKAGES = "munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins"
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"  # daemons live where an ordinary user's PATH does not lead
START_S, PATIENCE_S = 300.0, 900.0  # of a busy machine; what is waited for comes in seconds
LAST_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
NUM_CPUS, MEMORY_MB, NUM_GPUS = 8, 4000, 2  # of an emulated node, whatever the machine has

CONFIGURATION = """
ClusterName={name}
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=node_reg_mem_percent=1
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=300
KillWait=60
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_slurm() -> str | None:
    """Why no cluster can be started here, if so."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"no Slurm ({', '.join(missing)} not found): apt-get install {PACKAGES}" if missing else None


class Cluster:
    """Made by `start`; `stop` leaves nothing behind. Use `running` for both."""

    def __init__(self, num_nodes: int) -> None:
        # Not pytest's folder: the path of a socket has a limit of 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"n{index}" for index in range(num_nodes)]
        self.configuration = self.folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()

    def start(self) -> None:
        """Every daemon, and wait until every node is idle."""
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
        munge += [f"--key-file={self.folder}/munge.key", f"--seed-file={self.folder}/munge.seed", "--force"]
        self._daemon("munged", "munged", "--foreground", *munge)
        wait_for(lambda: (self.folder / "munge.socket").exists(), "munge", self.logs)
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.configuration))
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.states() == {"idle": len(self.nodes)}, "idle nodes", self.logs)

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.configuration))

    def stop(self) -> None:
        """End the daemons and whatever their jobs left; the folder goes too."""
        for name in reversed(list(self._daemons)):
            _end(self._daemons[name], signal.SIGTERM if name != "slurmctld" else signal.SIGKILL)
        for pid in self.members():
            _kill(pid)
        shutil.rmtree(self.folder, ignore_errors=True)

    def lose_node(self, node: str) -> None:
        """The node is gone from one moment to the next: its slurmd, the steps it watches, then their tasks."""
        lost = [pid for pid in self.members() if variables_of(pid).get("SLURMD_NODENAME") == node]
        steps = [pid for pid in self.members() if _is_step_of(pid, node)]
        _end(self._daemons.pop(node), signal.SIGKILL)
        for pid in [*steps, *lost]:
            _kill(pid)
        # What slurmctld would find out by itself after SlurmdTimeout and a ping.
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def cut_off(self, node: str) -> None:
        """Slurm loses the node, and gives up what runs there; what runs there does not notice."""
        _end(self._daemons.pop(node), signal.SIGKILL)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def return_node(self, node: str) -> None:
        """The node comes back."""
        self.start_node(node)

        def is_back() -> bool:
            resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
            # Refused as long as it is unknown, and once it is back.
            subprocess.run(resume, env=self.environment(), capture_output=True, check=False)
            return self.states() == {"idle": len(self.nodes)}

        wait_for(is_back, f"{node} back", self.logs)

    def command(self, *argv: str, variables: Mapping[str, str] | None = None) -> str:
        """What one of Slurm's commands prints; an AssertionError with what it says if it fails."""
        done = subprocess.run(
            argv, env=self.environment(variables), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *argv: str, variables: Mapping[str, str] | None = None) -> "Job":
        """`argv`: options of sbatch, a `--`, then the script's own arguments."""
        split = argv.index("--") if "--" in argv else len(argv)
        options, own = argv[:split], argv[split + 1 :]
        output = self.command("sbatch", "--parsable", *options, str(script), *own, variables=variables)
        return Job(self, int(output.split(";")[0]))

    def stir(self) -> None:
        """Something happens on this cluster: backfill, which alone starts heterogeneous jobs, looks only after that."""
        self.command("scontrol", "update", "PartitionName=urgent", "MaxTime=60")

    def states(self) -> dict[str, int]:
        """Number of nodes in each state."""
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%t %D"],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        pairs = (line.split() for line in done.stdout.splitlines())
        return {state: int(number) for state, number in pairs}

    def environment(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's, without what an outer Slurm or launcher put there."""
        own = {name: text for name, text in os.environ.items() if not _is_launchers(name)}
        return own | {"SLURM_CONF": str(self.configuration), "PATH": _path()} | dict(variables or {})

    def members(self) -> list[int]:
        """Processes of this cluster's jobs and steps, no zombies: by the configuration in their environment."""
        daemons = {process.pid for process in self._daemons.values()} | {os.getpid()}
        return [
            pid
            for pid in _pids()
            if pid not in daemons
            and (
                variables_of(pid).get("SLURM_CONF") == str(self.configuration)
                or str(self.configuration) in command_line_of(pid)
                or _is_step_of(pid, None, self.folder)
            )
        ]

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.log-file")]
        return "\n".join(f"--- {file.name}\n{_end_of(file)}" for file in sorted(files))

    def _daemon(self, name: str, *argv: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                argv,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=partial(end_with_parent, os.getpid()),  # also where this process is killed
            )

    def _configure(self) -> None:
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname()
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={NUM_CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:{NUM_GPUS}"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for index in range(NUM_GPUS):  # Slurm hands them out; torch finds nothing in them
            (self.folder / f"gpu{index}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-{NUM_GPUS - 1}] Flags=nvidia_gpu_env\n"
        )
        self.configuration.write_text(
            CONFIGURATION.format(
                name=self.folder.name,
                host=host,
                controller_port=controller_port,
                user=_user(),
                # Ports are made of it, and clusters may stand side by side.
                first_job=os.getpid() % 100_000 * 10 + 1,
                folder=self.folder,
                nodes="\n".join(lines),
            )
        )


class Job:
    """A submitted batch job."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says, of a heterogeneous job that of its first component."""
        text = self.cluster.command("scontrol", "show", "job", "-o", str(self.number))
        return dict(re.findall(r"(\S+?)=(\S*)", text.partition("\n")[0]))

    @property
    def state(self) -> str:
        return self.fields()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields()["Restarts"])

    def output(self) -> str:
        """What the batch script said, in all its attempts."""
        file = Path(self.fields()["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else ""

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Until `condition` holds; an AssertionError if the job ends before."""

        def holds() -> bool:
            over = self.state in LAST_STATES
            if condition():
                return True
            assert not over, f"the job ended before {what}:\n{self.said()}"
            return False

        wait_for(holds, what, self.said, timeout_s)

    def wait(self, timeout_s: float = PATIENCE_S) -> tuple[str, int]:
        """Its last state and the exit code of its script (0 where a signal ended it)."""
        wait_for(lambda: self.state in LAST_STATES, "the job's end", self.said, timeout_s)
        fields = self.fields()
        return fields["JobState"], int(fields["ExitCode"].split(":")[0])

    def cancel(self, *options: str) -> None:
        """`scancel`, or a signal by its options."""
        self.cluster.command("scancel", *options, str(self.number))

    def tasks(self, node: str | None = None) -> list[int]:
        """Processes of this job's steps that run the program, on one node or all; not the batch script's."""
        found = []
        for pid in _pids():
            variables = variables_of(pid)
            if (
                variables.get("SLURM_CONF") == str(self.cluster.configuration)
                and variables.get("SLURM_JOB_ID") == str(self.number)
                and variables.get("SLURM_STEP_ID", "").isdigit()
                and "SLURM_PROCID" in variables
                and "megatron_a3po" in command_line_of(pid)
                and node in (None, variables.get("SLURMD_NODENAME"))
            ):
                found.append(pid)
        return found

    def said(self) -> str:
        """Everything about it, for a person whose test failed."""
        return f"{self.fields()}\n{self.output()}"


@contextlib.contextmanager
def running(num_nodes: int) -> Iterator[Cluster]:
    """A cluster, from its first daemon to its last."""
    cluster = Cluster(num_nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_for(
    condition: Callable[[], bool], what: str, said: Callable[[], str], timeout_s: float = START_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {what}:\n{said()}"
        time.sleep(0.1)


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _is_launchers(name: str) -> bool:
    return name.startswith(("SLURM", "SBATCH", "SRUN")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def variables_of(pid: int) -> dict[str, str]:
    """The environment a process was started with; nothing where it is gone or another user's."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition("=") for item in content.decode(errors="replace").split("\0"))
    return {name: text for name, _, text in pairs}


def command_line_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _is_step_of(pid: int, node: str | None, folder: Path | None = None) -> bool:
    """Whether this is a slurmstepd; its environment is empty, its file descriptors tell whose it is."""
    if "slurmstepd" not in command_line_of(pid):
        return False
    try:
        targets = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(
        (folder is None or str(folder) in target) and (node is None or f"-{node}" in target)
        for target in targets
    )


def _end(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    process.send_signal(number)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end_of(file: Path, lines: int = 30) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
