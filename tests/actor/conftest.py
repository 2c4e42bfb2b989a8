"""Models and replays that the tests here share; they only add run directories to them."""

from pathlib import Path

import pytest

from tests.actor.replay import write_batches, write_config, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output projection is the embedding."""
    return write_model(tmp_path_factory.mktemp("tied_model"), tied=True)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Two steps of two mini-batches."""
    return _replay_of(tmp_path_factory.mktemp("replay"), model, num_steps=2)


@pytest.fixture(scope="session")
def tied_config(tmp_path_factory: pytest.TempPathFactory, tied_model: Path) -> Path:
    return _replay_of(tmp_path_factory.mktemp("tied_replay"), tied_model, num_steps=2)


@pytest.fixture(scope="session")
def long_config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Twenty steps of two mini-batches."""
    return _replay_of(tmp_path_factory.mktemp("long_replay"), model, num_steps=20)


def _replay_of(folder: Path, model: Path, num_steps: int) -> Path:
    write_batches(folder / "batches", model, num_steps)
    return write_config(folder, model, folder / "batches", num_steps)
