"""The process group's store, where ranks say something without meeting: keys and values that all of them see.

Its callers are threads beside the main one: `roll_call.py` and the checkpoints' (`trainer/saving.py`).
"""

import datetime
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]


def own_connection(prefix: str, timeout_s: float = 60.0) -> Any:
    """For one thread, whose keys begin with `prefix`: the main thread's connection may be waiting in the store."""
    store: Any = dist.distributed_c10d._get_default_store()
    own = store.clone()
    own.set_timeout(datetime.timedelta(seconds=timeout_s))
    return PrefixStore(prefix, own)
