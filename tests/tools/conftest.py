"""What the tests of the conversion command share: one checkpoint, and the same converted."""

from pathlib import Path

import pytest

from tests.tools.conversion import RANKS, command, qwen2_config
from tests.weights.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "qwen2", qwen2_config())


@pytest.fixture(scope="module")
def converted(qwen2: Path) -> Path:
    """The same for TP 2 x PP 2."""
    output = qwen2.with_name("qwen2-megatron")
    assert command("hf-to-megatron", qwen2, output, *RANKS).code == 0
    return output
