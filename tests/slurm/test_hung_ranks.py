"""A rank that hangs under a real Slurm: it is named, the step ends, and the job continues."""

import shutil

from tests.slurm.site import EVERY, STEPS, TP2, Site

HANGS_AT = 2 * EVERY + 2  # the checkpoint before the last is complete by then
PROGRAM = """case "$SLURM_RESTART_COUNT $*" in
    *--dry-run*) ;;
    " -m megatron_a3po train "*) shift 2; exec {{python}} -m tests.trainer.hung 0 {step} megatron_a3po "$@" ;;
esac
"""
BUSY = """#!/bin/sh
# A controller that cannot be asked at first.
case "$1 $2" in
    "show job" | "requeue "*)
        if [ ! -e "{folder}/$1" ]; then
            touch "{folder}/$1"
            echo "Unable to contact slurm controller (connect failure)" >&2
            exit 1
        fi ;;
esac
exec {scontrol} "$@"
"""


def test_the_first_rank_hangs_while_the_controller_is_busy(site: Site) -> None:
    """Rank 0 holds the store: a look into it does not come back, and neither would srun."""
    run_dir, busy = site.runs.folder / "hangs", site.runs.folder / "busy"
    busy.mkdir()
    path = site.slurm.environment()["PATH"]
    (busy / "scontrol").write_text(BUSY.format(folder=busy, scontrol=shutil.which("scontrol", path=path)))
    (busy / "scontrol").chmod(0o755)
    job = site.start(
        "train_nodes.sbatch",
        ["--nodes=2", "--ntasks-per-node=1"],
        [*site.runs.argv("hangs", "distributed.timeout_s=30")[1:], *TP2],
        A3PO_PYTHON=site.program("python-that-hangs", PROGRAM.format(step=HANGS_AT)),
        A3PO_TOGETHER_S="20",
        PATH=f"{busy}:{path}",
    )
    assert job.wait() == ("COMPLETED", 0), site.told(job, "hangs")
    assert job.restarts >= 1, site.told(job, "hangs")
    said = job.output()
    assert "distributed.timeout_s=30 allows for rank 0, which holds the process group's store" in said
    assert "a task was ended by signal 9; continues as attempt 2" in said
    assert {file.name for file in busy.iterdir()} == {"scontrol", "show", "requeue"}
    rows = site.runs.rows(run_dir.name)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert EVERY <= [row["attempt"] for row in rows].count(1) < HANGS_AT
