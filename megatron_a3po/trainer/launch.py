"""Start the ranks: under torchrun or srun this process is one; by itself it forks them all on this machine.

The parent imports everything once and forks, so that starting a rank costs nothing; it never touches a device, a
process group or a thread pool itself.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_a3po.config import Config
from megatron_a3po.config.checks import data_parallel_size
from megatron_a3po.environment import Launch, set_default
from megatron_a3po.errors import EXIT_CRASHED, EXIT_DONE, EXIT_INTERRUPTED, EXIT_NEEDS_PERSON
from megatron_a3po.lifetime import StopWish, end_with_parent
from megatron_a3po.trainer import recovery
from megatron_a3po.trainer.summary import closing_lines

GRACE_S = 10.0


def launch(config: Config, launched: Launch, stop: StopWish, *, resume: str) -> int:
    """Run the training; the exit code of the whole."""
    set_default("OMP_NUM_THREADS", "1")
    if launched.launcher == "self":
        return _launch_here(config, resume, stop)
    Place, run_rank = _import_worker()
    assert launched.world_size is not None
    address = f"tcp://{launched.master_address}:{launched.master_port}"
    if launched.launcher == "torchrun":
        address = "env://"
    place = Place(launched.rank, launched.world_size, launched.local_rank, address)
    try:
        return run_rank(config, place, None, resume, stop)
    except KeyboardInterrupt:
        raise
    except BaseException:  # run_rank has logged it
        return EXIT_CRASHED


def _launch_here(config: Config, resume: str, stop: StopWish) -> int:
    beginning = recovery.begin(config, resume)
    if beginning.kind == "finished":
        sys.stdout.write("\n".join(closing_lines(beginning.summary)) + "\n")
        return EXIT_DONE
    Place, run_rank = _import_worker()
    world_size = data_parallel_size(config, None) * config.actor.model_parallel_size
    with tempfile.TemporaryDirectory(prefix="a3po-") as directory:
        rendezvous = f"file://{directory}/rendezvous"

        parent = os.getpid()

        def rank_main(rank: int) -> None:
            end_with_parent(parent)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all; the parent answers it
            try:
                code = run_rank(config, Place(rank, world_size, rank, rendezvous), beginning, resume, stop)
            except BaseException:  # Megatron-Core's checkpoint errors are no Exceptions
                code = EXIT_CRASHED
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=rank_main, args=(rank,), name=f"rank-{rank}") for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        return _watch(ranks, Path(config.run_dir), stop)


def _import_worker() -> tuple[Any, Any]:
    """Torch and Megatron-Core, without their warnings about what is not installed: `doctor` tells that in words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_a3po.trainer.worker import Place, run_rank
    return Place, run_rank


def _watch(ranks: Sequence[BaseProcess], run_dir: Path, stop: StopWish) -> int:
    """Wait for the ranks; pass the wish to stop on; once one has failed, end the others by their ids."""
    told = False
    try:
        while any(process.is_alive() for process in ranks):
            if stop.wished and not told and ranks[0].is_alive() and ranks[0].pid:
                os.kill(ranks[0].pid, signal.SIGUSR1)
                told = True
            failed = _failed(ranks)
            if failed is not None:
                _end(ranks)
                return _code_of(ranks, failed, run_dir)
            time.sleep(0.05)
    except KeyboardInterrupt:
        _end(ranks, grace_s=0)
        return EXIT_INTERRUPTED
    failed = _failed(ranks)
    return EXIT_DONE if failed is None else _code_of(ranks, failed, run_dir)


def _failed(ranks: Sequence[BaseProcess]) -> BaseProcess | None:
    """A rank that was killed goes before those that crashed because it was gone."""
    failed = [process for process in ranks if process.exitcode]
    return min(failed, key=lambda process: (process.exitcode or 0) > 0, default=None)


def _code_of(ranks: Sequence[BaseProcess], failed: BaseProcess, run_dir: Path) -> int:
    """Rank 0's own code where it chose one: it has said why. A rank that crashed or was killed needs a person."""
    for process in (ranks[0], failed):
        if process.exitcode and process.exitcode > 0 and process.exitcode != EXIT_CRASHED:
            return process.exitcode
    log = run_dir / "logs" / f"{failed.name}.log"
    how = "failed" if failed.exitcode == EXIT_CRASHED else f"was ended by signal {-(failed.exitcode or 0)}"
    sys.stderr.write(f"{failed.name} (pid {failed.pid}) {how}; why is at the end of {log}\n")
    return EXIT_NEEDS_PERSON


def _end(ranks: Sequence[BaseProcess], grace_s: float = GRACE_S) -> None:
    """Ranks that waited for a dead one end by themselves or, after a grace, by force."""
    deadline = time.monotonic() + grace_s
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
