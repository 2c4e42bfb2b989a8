"""Whatever the pickles of a checkpoint ask for, only data is made of them. The attack is real: plain torch falls for
it."""

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_a3po.actor import checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.errors import InputError
from megatron_a3po.weights.unpickling import read_metadata, refuse_code
from tests.actor.ranks import on_actors

SCHEDULE = Schedule(1e-3, 0.0, 1, "constant", 10)


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the actor, as the trainer writes it."""
    directory = tmp_path_factory.mktemp("saved")

    def save(actor: Actor) -> None:
        actor.start_stage(SCHEDULE)
        checkpoint.save(actor, directory)

    on_actors(save, model)
    return directory


def in_metadata(directory: Path, attack: Attack) -> str:
    (directory / ".metadata").write_bytes(pickle.dumps(attack))
    return ".metadata"


def beside_good_metadata(directory: Path, attack: Attack) -> str:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = attack
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".metadata"


def in_common_state(directory: Path, attack: Attack) -> str:
    torch.save({"scheduler": attack}, directory / "common.pt")
    return "common.pt"


def in_an_object(directory: Path, attack: Attack) -> str:
    """In place of one of the objects that are no tensors; newer Megatron-Core keeps the common state so."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index, place = next(
        (index, place)
        for index, place in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    )
    file = directory / place.relative_path
    start = file.stat().st_size
    with file.open("ab") as stream:
        torch.save([attack], stream)
    length = file.stat().st_size - start
    metadata.storage_data[index] = dataclasses.replace(place, offset=start, length=length)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return file.name


PLACES = (in_metadata, beside_good_metadata, in_common_state, in_an_object)


@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_checkpoint_is_refused_and_never_run(
    saved: Path, tmp_path: Path, place: Callable[[Path, Attack], str]
):
    directory = tmp_path / "attacked"
    shutil.copytree(saved, directory)
    name = place(directory, Attack(tmp_path / "canary"))
    with pytest.raises(
        InputError, match=rf"attacked/{name} is not loaded.*it asks for \w+\.system"
    ) as caught:
        refuse_code(directory)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert not (tmp_path / "canary").exists()


def test_the_attack_works_on_a_reader_that_trusts(saved: Path, tmp_path: Path):
    directory = tmp_path / "attacked"
    shutil.copytree(saved, directory)
    in_metadata(directory, Attack(tmp_path / "canary"))
    with pytest.raises(AttributeError):
        FileSystemReader(directory).read_metadata()
    assert (tmp_path / "canary").exists()


# How the newest Megatron-Core calls torch.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning")
def test_the_actor_loads_nothing_that_is_not_data(model: Path, saved: Path, tmp_path: Path):
    attacked = [tmp_path / place.__name__ for place in PLACES]
    for directory, place in zip(attacked, PLACES):
        shutil.copytree(saved, directory)
        place(directory, Attack(tmp_path / "canary"))

    def load(actor: Actor) -> list[str]:
        actor.start_stage(SCHEDULE)
        checkpoint.load(actor, saved)
        refused = []
        for directory in attacked:
            with pytest.raises(InputError) as caught:
                checkpoint.load(actor, directory)
            refused += caught.value.problems
        return refused

    (refused,) = on_actors(load, model)
    assert len(refused) == len(PLACES)
    assert not (tmp_path / "canary").exists()


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(InputError, match="is no distributed checkpoint"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"\.metadata is not loaded, since it is damaged"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match=r"\.metadata is not loaded.*it holds a list"):
        read_metadata(tmp_path)
