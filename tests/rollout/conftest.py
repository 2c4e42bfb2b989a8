"""A tiny random Qwen2 in folders as the trainer publishes them."""

from pathlib import Path

import pytest
import torch

from tests.rollout.tiny import tiny_model, tiny_tokenizer

NUM_VERSIONS = 4


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Hugging Face directories of versions 0, 1, ...; the first has the tokenizer too."""
    root = tmp_path_factory.mktemp("weights")
    directories = [root / f"version-{version}" for version in range(NUM_VERSIONS)]
    for seed, directory in enumerate(directories):
        tiny_model(seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directories[0])
    return directories


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
