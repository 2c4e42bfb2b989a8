"""A Slurm job in words: what a process inside one sees of it, and what each of its states means.

From the environment, and from `scontrol` where it can be called (in a container it often cannot). The jobs themselves
are in `slurm/`. No torch here.
"""

import re
import subprocess
from collections.abc import Mapping

from megatron_a3po.environment import Launch, node_name
from megatron_a3po.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NEEDS_PERSON, EXIT_STOPPED, InputError

UNKNOWN = "unknown: scontrol does not answer here"

STATES: Mapping[str, str] = {
    "PENDING": "waits for its turn (or, once requeued, for the time Slurm holds it back)",
    "CONFIGURING": "its nodes are being made ready",
    "RUNNING": "is under way",
    "RESIZING": "is getting more nodes or fewer",
    "SIGNALING": "is being sent a signal",
    "SUSPENDED": "was suspended, and goes on where it was when Slurm resumes it",
    "STOPPED": "was stopped, and goes on where it was: scancel --signal=CONT",
    "COMPLETING": "is ending; Slurm waits for its last processes",
    "STAGE_OUT": "has ended; Slurm moves its files",
    "COMPLETED": "done: the run is finished",
    "CANCELLED": "was cancelled, with a checkpoint where there was time: submit it again to continue",
    "FAILED": "stopped for a person: the last line of its log says why",
    "TIMEOUT": "reached its time limit before it had stopped by itself: let --signal come earlier, submit it again",
    "NODE_FAIL": "lost a node and may not be requeued: submit it again to continue from the last checkpoint",
    "PREEMPTED": "made way for another job: submit it again to continue, if Slurm has not requeued it",
    "OUT_OF_MEMORY": "used more memory than it had: ask for more, submit it again to continue",
    "BOOT_FAIL": "a node did not start: submit it again",
    "DEADLINE": "could not end before its deadline: submit it again with another",
    "REVOKED": "ran in another cluster of the federation",
    "REQUEUED": "was requeued, and waits for its turn",
    "REQUEUE_FED": "was requeued in another cluster of the federation",
    "RESV_DEL_HOLD": "is held, since its reservation was deleted: scontrol release lets it continue without",
    "REQUEUE_HOLD": "was requeued and is held: scontrol release lets it continue",
    "SPECIAL_EXIT": "was requeued and is held, by its exit code: see its log, then scontrol release",
    "LAUNCH_FAILED": "could not be started on its nodes: see to them (sinfo -R), submit it again",
    "RECONFIG_FAIL": "its nodes could not be made ready: see to them (sinfo -R), submit it again",
}

ENDINGS: Mapping[int, str] = {  # of FAILED, by the exit code of its script
    EXIT_BAD_INPUT: "the configuration or an input is wrong: its log has the sentences; mend it, submit it again",
    EXIT_NEEDS_PERSON: "needs a person: the last line of its log says why; then submit it again to continue",
    EXIT_STOPPED: "stopped early, as it was asked to: submit it again to continue",
    EXIT_INTERRUPTED: "was interrupted: submit it again to continue from the last checkpoint",
}


def rows(variables: Mapping[str, str], launched: Launch) -> list[tuple[str, str]]:
    """What this process sees of its job. Errors: InputError outside of one."""
    job = variables.get("SLURM_JOB_ID")
    if job is None:
        raise InputError(
            "--slurm: this process is in no Slurm job (SLURM_JOB_ID is not set); run it in an allocation, for example "
            "`salloc --nodes=2 srun python -m megatron_a3po doctor --slurm`, or name a job: --slurm JOB"
        )
    # The last task of an array has the number of the whole array.
    task = variables.get("SLURM_ARRAY_TASK_ID")
    records = read_records(f"{variables['SLURM_ARRAY_JOB_ID']}_{task}" if task is not None else job)
    record = records[0] if records else {}
    return [
        ("job", f"{job} ({variables.get('SLURM_JOB_NAME', '?')}), {describe(record)}"),
        ("partition", variables.get("SLURM_JOB_PARTITION", "?")),
        ("nodes", _nodes(variables)),
        ("this node", f"{node_name()}, number {variables.get('SLURM_NODEID', '?')}"),
        ("attempt", str(int(variables.get("SLURM_RESTART_COUNT", "0")) + 1)),
        ("tasks", _tasks(variables, launched)),
        ("rendezvous", _rendezvous(launched)),
        ("CPUs, GPUs of the node", f"{variables.get('SLURM_CPUS_ON_NODE', '?')}, {_gpus(variables)}"),
        ("time", _time(record)),
        ("requeue", _requeue(record)),
    ]


def read_records(job: str) -> list[dict[str, str]]:
    """What `scontrol show job` says: of each task of an array, of each component of a heterogeneous job; nothing where
    it cannot be asked."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [dict(found) for line in done.stdout.splitlines() if (found := re.findall(r"(\S+?)=(\S*)", line))]


def describe(record: Mapping[str, str]) -> str:
    """The state of a job in words."""
    state = record.get("JobState")
    if state is None:
        return UNKNOWN
    words = STATES.get(state, "see the manual of squeue")
    code = int(record.get("ExitCode", "0:0").partition(":")[0])
    if state == "FAILED":
        words = ENDINGS.get(code, words)
    return f"{state}: {words}" + (f" (exit code {code})" if code else "")


def describe_job(job: str) -> list[tuple[str, str]]:
    """A job as its owner sees it from outside, part by part. Errors: InputError where Slurm does not know it."""
    records = [record for record in read_records(job) if "JobState" in record]
    if not records:
        raise InputError(
            f"--slurm {job}: Slurm does not know this job (any more); squeue --me lists those there are"
        )
    return [row for record in records for row in _described(record)]


def _described(record: Mapping[str, str]) -> list[tuple[str, str]]:
    name = record.get("JobId", "?")
    if "ArrayTaskId" in record:
        name = f"{record['ArrayJobId']}_{record['ArrayTaskId']}"
    elif "HetJobOffset" in record:
        name = f"{record['HetJobId']}+{record['HetJobOffset']}"
    return [
        ("job", f"{name} ({record.get('JobName', '?')})"),
        ("state", describe(record)),
        ("nodes", record.get("NodeList", "?")),
        ("attempt", str(int(record.get("Restarts", "0")) + 1)),
        ("time", _time(record)),
        ("log", record.get("StdOut", "?")),
    ]


def _nodes(variables: Mapping[str, str]) -> str:
    """Of a heterogeneous job those of every component: the trainer's first, then the servers'."""
    components = range(int(variables.get("SLURM_HET_SIZE", "0")))
    ends = [f"_HET_GROUP_{number}" for number in components] or [""]
    return ", and ".join(
        f"{variables.get(f'SLURM_JOB_NUM_NODES{end}', '?')}: {variables.get(f'SLURM_JOB_NODELIST{end}', '?')}"
        for end in ends
    )


def _tasks(variables: Mapping[str, str], launched: Launch) -> str:
    if launched.launcher == "srun":
        return f"{launched.world_size}, of which this is {launched.rank}: train takes each as one rank"
    if launched.launcher == "torchrun":
        return f"torchrun's {launched.world_size} ranks, of which this is {launched.rank}"
    where = "one in its step" if variables.get("SLURM_STEP_ID", "").isdigit() else "none: the batch shell"
    return f"{where}, so train starts its ranks itself, on this node alone"


def _rendezvous(launched: Launch) -> str:
    return (
        "a file, on this node"
        if launched.launcher == "self"
        else f"{launched.master_address}:{launched.master_port}"
    )


def _gpus(variables: Mapping[str, str]) -> str:
    return variables.get("SLURM_GPUS_ON_NODE") or variables.get("SLURM_JOB_GPUS") or "none asked for"


def _time(record: Mapping[str, str]) -> str:
    if "RunTime" not in record:
        return UNKNOWN
    return f"{record['RunTime']} of {record.get('TimeLimit', '?')}, until {record.get('EndTime', '?')}"


def _requeue(record: Mapping[str, str]) -> str:
    if "Requeue" not in record:
        return UNKNOWN
    if record.get("BatchFlag") == "0":
        return "not possible: this is no batch job"
    return "allowed" if record["Requeue"] == "1" else "not allowed (--requeue): it cannot continue by itself"
