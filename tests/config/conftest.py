"""Fixtures for the configuration's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_a3po.config import Config, load_config
from tests.run_files import write_run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture
def load(run_file: Path) -> Callable[..., Config]:
    """load_config on the tiny run with overrides."""

    def load_with(*overrides: str, **options) -> Config:
        return load_config(run_file, overrides, **options)

    return load_with
