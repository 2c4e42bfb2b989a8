"""Nodes that are no good, under a real Slurm: they are named before anything runs on them, and spare ones stand in."""

from tests.slurm.site import TP2, Site

SHORT = ["trainer.steps=2", "actor.lr_warmup_iters=1"]
WITH_A_SPARE = {"A3PO_PREFLIGHT": "1", "A3PO_SPARE_NODES": "1"}


def test_the_first_node_hangs_in_its_test_and_can_nothing_else(site: Site) -> None:
    broken = 'case "$SLURMD_NODENAME $*" in "n0 "*report*) exec sleep 1000 ;; "n0 "*) exit 1 ;; esac\n'
    job = site.start(
        "train_nodes.sbatch",
        ["--nodes=3", "--ntasks-per-node=1"],
        [*site.runs.argv("first-broken", *SHORT)[1:], *TP2],
        A3PO_PYTHON=site.program("python-broken-on-n0", broken),
        A3PO_TOGETHER_S="60",
        **WITH_A_SPARE,
    )
    assert job.wait() == ("COMPLETED", 0), site.told(job, "first-broken")
    assert "bad node n0: no report" in job.output()
    assert "runs on n1,n2" in job.output()


def test_without_a_spare_a_bad_node_stops_the_job(site: Site) -> None:
    broken = 'case "$SLURMD_NODENAME $*" in "n1 "*preflight*) exit 1 ;; esac\n'
    job = site.start(
        "train_nodes.sbatch",
        ["--nodelist=n[0-1]", "--ntasks-per-node=1"],
        [*site.runs.argv("no-spare", *SHORT)[1:], *TP2],
        A3PO_PYTHON=site.program("python-broken-on-n1", broken),
        A3PO_PREFLIGHT="1",
    )
    assert job.wait() == ("FAILED", 3), job.said()
    assert "bad node n1: no report" in job.output()
    assert "1 of 2 nodes passed, 2 are wanted" in job.output()


def test_a_node_that_fails_where_the_others_meet_it(site: Site) -> None:
    """It is left out, once; a second one has no spare."""
    elsewhere = (
        'case "$SLURMD_NODENAME $*" in {nodes}) '
        'exec {{python}} "$1" "$2" "$3" "$4" /dev/null/nowhere "$6" "$7" "$8" ;; esac\n'
    )
    one = site.program("python-lonely-on-n1", elsewhere.format(nodes='"n1 "*preflight\\ meet*'))
    all_others = site.program("python-lonely-but-n0", elsewhere.format(nodes="n[12]\\ *preflight\\ meet*"))
    options, argv = ["--nodes=3", "--ntasks-per-node=1"], [*site.runs.argv("lonely", *SHORT)[1:], *TP2]
    job = site.start("train_nodes.sbatch", options, argv, A3PO_PYTHON=all_others, **WITH_A_SPARE)
    assert job.wait() == ("FAILED", 3), job.said()
    assert "bad node n1: cannot make /dev/null/nowhere (Not a directory)" in job.output()
    assert "bad node n2: cannot make /dev/null/nowhere (Not a directory)" in job.output()
    assert "too few nodes share" in job.output()
    assert job.restarts == 0

    job = site.start("train_nodes.sbatch", options, argv, A3PO_PYTHON=one, **WITH_A_SPARE)
    assert job.wait() == ("COMPLETED", 0), site.told(job, "lonely")
    assert "runs on n0,n2" in job.output()


def test_gpus_are_tested_however_they_were_asked_for(site: Site) -> None:
    """The nodes' GPUs here are none: torch finds nothing."""
    argv = [*site.runs.argv("no-gpus", *SHORT)[1:], *TP2]
    job = site.start("train.sbatch", ["--nodelist=n1", "--gres=gpu:2"], argv, A3PO_PREFLIGHT="1")
    assert job.wait() == ("FAILED", 3), job.said()
    assert "bad node n1: torch sees 0 GPUs, wanted 2" in job.output()


def test_spare_nodes_that_leave_none_to_run_on(site: Site) -> None:
    job = site.start(
        "train_servers.sbatch",
        ["--nodes=2"],
        [str(site.runs.config)],
        A3PO_SPARE_NODES="1",
        A3PO_SERVER_NODES="1",
    )
    assert job.wait() == ("FAILED", 2), job.said()
    assert "A3PO_SPARE_NODES=1 and A3PO_SERVER_NODES=1 leave the trainer no node of 2" in job.output()
