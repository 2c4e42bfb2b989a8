"""What a checkpoint keeps of the rollouts, in a file that makes nothing but data when it is read.

`rollouts.npz`: `state` is JSON in which a group stands as {"group": [...]}. Its trajectories' tokens, versions and
behaviour log-probs are rows of the arrays beside it, of which the text says from where to where.
"""

import json
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_a3po.errors import InputError
from megatron_a3po.rollout.trajectory import Group, Trajectory

ARRAYS = {"tokens": np.int32, "versions": np.int32, "behave_logp": np.float32}


def write_rollout_state(path: Path, state: dict[str, Any] | None) -> None:
    """Keep what `RolloutClient.state` gave, None where there are no rollouts. Keys of mappings become text."""
    trajectories: list[Trajectory] = []
    end = 0

    def row(one: Trajectory) -> list[Any]:
        nonlocal end
        start, end = end, end + len(one.tokens)
        trajectories.append(one)
        values = [one.prompt_index, one.sample, one.prompt_length, one.finish_reason, one.reward]
        return [*values, start, end, one.given]

    def plain(group: Any) -> dict[str, Any]:
        if not isinstance(group, Group):
            raise TypeError(f"the state of the rollouts holds a {type(group).__name__}")
        return {"group": [group.prompt_index, group.prompt, group.answer, list(map(row, group.trajectories))]}

    text = json.dumps(state, default=plain).encode()
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(getattr(one, name) for one in trajectories)])
        for name, dtype in ARRAYS.items()
    }
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, state=np.frombuffer(text, np.uint8), **arrays)


def read_rollout_state(path: Path) -> dict[str, Any] | None:
    """What `write_rollout_state` has kept. Errors: InputError names the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)

        def restored(value: dict[str, Any]) -> Any:
            return _group(arrays, *value["group"]) if value.keys() == {"group"} else value

        return json.loads(arrays.pop("state").tobytes(), object_hook=restored)
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is no state of rollouts ({error}); resume from another checkpoint of the run"
        ) from None


def _group(
    arrays: dict[str, np.ndarray], prompt_index: int, prompt: str, answer: str, rows: list[list[Any]]
) -> Group:
    trajectories = tuple(
        Trajectory(
            prompt_index=index,
            sample=sample,
            prompt_length=prompt_length,
            finish_reason=finish_reason,
            reward=reward,
            tokens=arrays["tokens"][start:end],
            versions=arrays["versions"][start:end],
            behave_logp=arrays["behave_logp"][start:end],
            given=tuple((one, other) for one, other in given),
        )
        for index, sample, prompt_length, finish_reason, reward, start, end, given in rows
    )
    return Group(prompt_index, prompt, answer, trajectories)
