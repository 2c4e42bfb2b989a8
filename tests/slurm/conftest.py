"""One cluster for all tests here, or the reason why there is none; and the tiny run that the jobs train."""

import os
import sys
from collections.abc import Iterator

import pytest
import yaml

from megatron_a3po.trainer.batch import batch_path
from tests.slurm import cluster
from tests.slurm.cluster import Cluster
from tests.slurm.site import EVERY, HELD, ROOT, STEPS, Site
from tests.trainer.replay import Replays

NUM_NODES = 3


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if reason := cluster.missing_slurm():
        pytest.skip(reason)
    with cluster.running(NUM_NODES) as running:
        yield running


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Replays:
    """A tiny model and enough steps to be stopped in the middle: four batches over and over."""
    replays = Replays(tmp_path_factory.mktemp("slurm"))
    batches = replays.folder / "many-batches"
    batches.mkdir()
    for step in range(1, STEPS + 1):
        os.link(batch_path(replays.folder / "batches", (step - 1) % 4 + 1), batch_path(batches, step))
    config = yaml.safe_load(replays.config.read_text())
    config["trainer"] |= {"steps": STEPS, "save_every": EVERY, "replay": str(batches)}
    config["actor"] |= {"prox_logp_method": "loglinear", "lr": 2e-4, "lr_warmup_iters": 4}
    replays.config.write_text(yaml.safe_dump(config))
    return replays


PYTHON = """#!/bin/sh
case "$*" in
    *--dry-run*) ;;
    "-m megatron_a3po train "*) shift 2; exec {python} -m tests.trainer.held {held} megatron_a3po "$@" ;;
esac
exec {python} "$@"
"""


@pytest.fixture(scope="session")
def variables(runs: Replays) -> dict[str, str]:
    """What the scripts of `slurm/` take from their environment; the first attempt of a job waits in its middle."""
    python = runs.folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, held=HELD))
    python.chmod(0o755)
    return {
        "A3PO_HOME": str(ROOT),
        "A3PO_PYTHON": str(python),
        "A3PO_LOGS": str(runs.folder / "logs"),
        "A3PO_PREFLIGHT": "0",
        "PYTHONPATH": f"{runs.folder}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def site(slurm: Cluster, runs: Replays, variables: dict[str, str]) -> Site:
    return Site(slurm, runs, variables)
