"""One folder of replays for all tests here: they only add run directories to it."""

import pytest

from tests.trainer.replay import Replays


@pytest.fixture(scope="session")
def replays(tmp_path_factory: pytest.TempPathFactory) -> Replays:
    return Replays(tmp_path_factory.mktemp("replays"))
