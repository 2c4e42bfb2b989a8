"""The scripts of `slurm/` on a real Slurm: jobs that are stopped, lose a node or their tasks, and continue."""

import os
import re
import signal
import subprocess

import pytest
from safetensors.torch import load_file

from megatron_a3po.trainer.slurm_job import STATES
from tests.slurm.site import EVERY, HELD, MIDDLE, STEPS, TP2, TP2_PP2, Site, doctor, in_the_middle, let_go
from tests.trainer.replay import Replays, Rows, Weights, identical, logs_of, without_times
from tests.trainer.test_resume import num_rows, step_of

PASS_OVER = 'case "$*" in *--dry-run* | *take_over*) exec {python} "$@" ;; esac\n'


@pytest.fixture(scope="module")
def straight(runs: Replays) -> dict[int, tuple[Rows, Weights]]:
    """By number of ranks: the same run without Slurm and without a stop."""
    return {2: runs.run("straight-2", *TP2), 4: runs.run("straight-4", *TP2_PP2)}


def test_a_job_that_is_told_to_stop_goes_on_as_if_nothing_had_been(site: Site, straight) -> None:
    job = site.submit("stopped", ranks=4)
    in_the_middle(job, site.runs.folder / "stopped")
    job.cancel("--batch", "--signal=USR1")  # what --signal=B:USR1@600 does near the time limit
    attempts = site.has_continued(job, "stopped", straight[4])
    assert MIDDLE <= attempts.count(1) < STEPS
    assert attempts == sorted(attempts)
    assert "stopped early; continues as attempt 2" in job.output()
    for attempt in (1, 2):  # the file's name has the node's number, the machine's name and the rank
        logs = sorted(path.name for path in site.logs(job, attempt).glob("*-rank-*"))
        assert [(name[0], name[-5]) for name in logs] == [("0", "0"), ("0", "1"), ("1", "2"), ("1", "3")]


def test_a_preempted_job_saves_and_waits_for_its_next_turn(site: Site, straight) -> None:
    urgent = site.runs.folder / "urgent.sbatch"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    job = site.submit("preempted", "--exclusive")
    in_the_middle(job, site.runs.folder / "preempted")
    other = site.slurm.submit(urgent, "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
    assert other.wait() == ("COMPLETED", 0), site.told(job, "preempted")
    attempts = site.has_continued(job, "preempted", straight[2])
    assert MIDDLE <= attempts.count(1) < STEPS
    assert "stopped early; continues as attempt 2" in job.output()


def test_a_job_that_loses_a_node_goes_on_elsewhere(site: Site, straight) -> None:
    job = site.submit("node-lost")
    in_the_middle(job, site.runs.folder / "node-lost")
    site.slurm.lose_node("n1")
    try:
        attempts = site.has_continued(job, "node-lost", straight[2])
    finally:
        site.slurm.return_node("n1")
    assert EVERY <= attempts.count(1) < STEPS  # what came after the last checkpoint was done again
    assert job.fields()["NodeList"] == "n[0,2]"
    assert "attempt 2: begins on n[0,2]" in job.output()


def test_a_node_that_is_cut_off_but_runs_is_fenced_off(site: Site, straight) -> None:
    """Slurm has lost the node and runs the job elsewhere; there the old tasks stand still, and then go on."""
    run_dir = site.runs.folder / "cut-off"
    job = site.start("train.sbatch", [], [*site.runs.argv("cut-off")[1:], *TP2])
    in_the_middle(job, run_dir)
    (node,) = {*site.nodes_of(job.tasks())}
    old = job.tasks()
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    try:
        site.slurm.cut_off(node)
        job.wait_for(lambda: "fences it off" in site.take_over(job, 2), "the next attempt")
        assert {*old} <= {*job.tasks(node)}, "the old attempt is alive"
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        attempts = site.has_continued(job, "cut-off", straight[2])
    finally:
        site.slurm.return_node(node)
    assert {1, 3} == {*attempts}  # 2 is the number that fenced
    assert "attempt 1 of" in logs_of(run_dir)
    assert "is fenced off" in logs_of(run_dir)
    assert f"begins on {node}" not in job.output().split("attempt 2: ")[-1]


def test_a_job_whose_task_is_killed_goes_on(site: Site, straight) -> None:
    job = site.submit("task-killed")
    in_the_middle(job, site.runs.folder / "task-killed")
    for pid in job.tasks("n1"):
        os.kill(pid, signal.SIGKILL)
    let_go(site.runs.folder / "task-killed")
    attempts = site.has_continued(job, "task-killed", straight[2])
    assert EVERY <= attempts.count(1) < STEPS
    assert "a task was ended by signal 9; continues as attempt 2" in job.output()


def test_a_cancelled_job_does_not_continue_until_it_is_submitted_again(site: Site, straight) -> None:
    run_dir = site.runs.folder / "cancelled"
    job = site.submit("cancelled")
    in_the_middle(job, run_dir)
    job.cancel()
    assert job.wait()[0] == "CANCELLED", site.told(job, "cancelled")
    assert job.restarts == 0
    stopped_at = num_rows(run_dir)
    assert step_of(run_dir / "checkpoints" / f"step-{stopped_at}") == stopped_at < STEPS
    assert job.tasks() == []
    assert "CANCELLED: was cancelled" in doctor(site, job)

    again = site.submit("cancelled")
    assert again.wait() == ("COMPLETED", 0), site.told(again, "cancelled")
    assert without_times(site.runs.rows("cancelled")) == without_times(straight[2][0])
    assert identical(site.runs.weights("cancelled"), straight[2][1])


def test_one_node_that_is_told_to_end_saves_and_ends(site: Site) -> None:
    run_dir = site.runs.folder / "one-node"
    job = site.start("train.sbatch", [], [*site.runs.argv("one-node")[1:], *TP2])
    in_the_middle(job, run_dir)
    job.cancel("--batch", "--signal=USR2")
    assert job.wait() == ("FAILED", 75), site.told(job, "one-node")
    assert step_of(run_dir / "checkpoints" / f"step-{num_rows(run_dir)}") < STEPS
    assert "stopped early; asked to end" in job.output()
    assert "FAILED: stopped early, as it was asked to" in doctor(site, job)


def test_a_job_that_never_completes_a_step_stops_for_a_person(site: Site) -> None:
    """Three attempts long: tasks that die at once, and once already the step that takes over."""
    dies = 'case "$SLURM_RESTART_COUNT $*" in "1 "*take_over*) kill -9 $$ ;; esac\n'
    python = site.program("python-that-dies", dies + PASS_OVER + "kill -9 $$\n")
    job = site.submit("crash-loop", A3PO_PYTHON=python)
    assert job.wait() == ("FAILED", 3), job.said()
    assert job.restarts == 2
    assert job.output().count("begins on") == 3
    assert "taking over from the attempt before: a task was ended by signal 9; continues" in job.output()
    assert "has not stopped" not in job.output()
    assert "3 attempts in a row have completed no step after 0: needs a person" in job.output()
    assert "FAILED: needs a person" in doctor(site, job)


def test_a_wrong_configuration_is_not_tried_twice(site: Site) -> None:
    job = site.start("train_nodes.sbatch", [], [str(site.runs.config), "actor.lr=fast"])
    assert job.wait() == ("FAILED", 2), job.said()
    assert job.restarts == 0
    assert 'actor.lr is "fast"' in job.output()
    assert "FAILED: the configuration or an input is wrong" in doctor(site, job)

    anew = site.start("train_nodes.sbatch", [], [str(site.runs.config), "--resume", "never"])
    assert anew.wait() == ("FAILED", 2), anew.said()
    assert "would begin anew at every attempt" in anew.output()


def test_a_conversion_job(site: Site) -> None:
    source, target, back = (site.runs.folder / name for name in ("model", "for-megatron", "back"))
    there = ["hf-to-megatron", str(source), str(target), "--tensor-model-parallel-size=2"]
    job = site.start("convert.sbatch", [], there)
    assert job.wait() == ("COMPLETED", 0), job.said()
    again = site.start("convert.sbatch", [], ["megatron-to-hf", str(target), str(back)])
    assert again.wait() == ("COMPLETED", 0), again.said()
    tensors = [load_file(next(folder.glob("*.safetensors"))) for folder in (source, back)]
    assert identical(*tensors)
    refused = site.start("convert.sbatch", [], ["megatron-to-hf", str(source / "nowhere"), str(back)])
    assert refused.wait() == ("FAILED", 2), refused.said()
    assert "the input is wrong" in refused.output()


def test_doctor_says_what_a_job_sees(site: Site) -> None:
    program = [site.variables["A3PO_PYTHON"], "-m", "megatron_a3po", "doctor", "--slurm"]
    said = site.slurm.command("srun", "--nodes=2", "--label", *program, variables=site.variables)
    assert "2: n[0-1]" in said
    assert "2, of which this is 0: train takes each as one rank" in said
    assert "2, of which this is 1: train takes each as one rank" in said
    assert "RUNNING: is under way" in said
    assert "not possible: this is no batch job" in said


def test_every_state_that_slurm_knows_is_said_in_words(site: Site) -> None:
    done = subprocess.run(
        ["squeue", "--states=nonsense"],
        env=site.slurm.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    (known,) = re.findall(r"Valid job states include: (\S+)", done.stderr)
    assert len(known.split(",")) > 20
    assert {*known.split(",")} <= STATES.keys()


def test_a_job_that_may_not_be_requeued_and_one_that_is_held(site: Site) -> None:
    script = site.runs.folder / "sleeps.sbatch"
    script.write_text("#!/bin/sh\nsleep 1000\n")
    lost = site.slurm.submit(script, "--nodelist=n2", "--no-requeue", "--output=/dev/null")
    held = site.slurm.submit(script, "--nodelist=n1", "--output=/dev/null")
    site.wait(lambda: lost.state == held.state == "RUNNING", lost)
    site.slurm.lose_node("n2")
    try:
        assert lost.wait()[0] == "NODE_FAIL"
        assert "NODE_FAIL: lost a node and may not be requeued" in doctor(site, lost)
        site.slurm.command("scontrol", "requeuehold", "State=SpecialExit", str(held.number))
        site.wait(lambda: held.state != "COMPLETING", held)
        assert "SPECIAL_EXIT: was requeued and is held, by its exit code" in doctor(site, held)
    finally:
        held.cancel()
        site.slurm.return_node("n2")


@pytest.mark.slow
def test_a_real_time_limit(site: Site) -> None:
    """Of four minutes; until it is near, the first attempt waits before its last step."""
    steps, run_dir = HELD, site.runs.folder / "limited"
    rollouts = [
        "trainer.replay=null",
        f"trainer.steps={steps}",
        "rollout.max_staleness=null",
        "rollout.fixed_staleness=1",
        "reward={type: function, path: 'tests.trainer.rewards:any_response'}",
    ]
    options = ["--time=4", "--signal=B:USR1@150", "--nodes=2", "--ntasks-per-node=1"]
    job = site.start("train_nodes.sbatch", options, [*site.runs.argv("limited", *rollouts)[1:], *TP2])
    assert job.wait(timeout_s=1200) == ("COMPLETED", 0), site.told(job, "limited")
    assert job.restarts >= 1
    assert "asked to stop, then to continue" in job.output()
    assert [row["step"] for row in site.runs.rows("limited")] == list(range(1, steps + 1))
    assert num_rows(run_dir) == steps, "a step was done twice: some attempt ended without its checkpoint"
