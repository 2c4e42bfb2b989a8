"""The process group's store, where ranks say something without meeting: keys and values that all of them see.

Its callers are threads beside the main one: `roll_call.py` and the checkpoints' (`trainer/saving.py`).
"""

import datetime
import threading
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_a3po.errors import AbsentRank

Answer = TypeVar("Answer")


def gather(init_method: str, rank: int, world_size: int, timeout_s: float) -> Any:
    """Rank 0's store at tcp://ADDRESS:PORT, once every rank has come to it; None for other methods, which are torch's.

    Errors: AbsentRank, by name.
    """
    place = urllib.parse.urlsplit(init_method)
    if place.scheme != "tcp":
        return None
    assert place.hostname is not None
    assert place.port is not None
    waited = f"the ranks have waited as long as distributed.timeout_s={timeout_s:g} allows for"
    # The others wait a little longer, so that rank 0 is there to say who is missing.
    timeout = datetime.timedelta(seconds=timeout_s + (10 if rank else 0))
    try:
        store = TCPStore(place.hostname, place.port, None, rank == 0, timeout, wait_for_workers=False)
    except RuntimeError:
        if rank == 0:
            raise
        raise AbsentRank(f"{waited} rank 0, which is not at {place.netloc}") from None
    try:
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(world_size)])
    except RuntimeError:
        if rank:
            raise AbsentRank(f"{waited} some that did not start: rank 0 says which") from None
        missing = [str(other) for other in range(world_size) if not store.check([f"here/{other}"])]
        raise AbsentRank(f"{waited} those that did not start: rank {', '.join(missing)}") from None
    return PrefixStore("grid", store)


def own_connection(prefix: str, timeout_s: float = 60.0) -> Any:
    """For one thread, whose keys begin with `prefix`: the main thread's connection may be waiting in the store."""
    store: Any = dist.distributed_c10d._get_default_store()
    own = store.clone()
    own.set_timeout(datetime.timedelta(seconds=timeout_s))
    return PrefixStore(prefix, own)


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What `ask` finds in a store that may never answer: over TCP a rank holds it, and may be stopped.

    Errors: TimeoutError, and the thread that asks is left behind; whatever `ask` raises.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return answer.result(seconds)
