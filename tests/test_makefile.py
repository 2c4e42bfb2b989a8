"""The commands where a machine lacks something: loud, and a failure where everything is required."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("required", "code"), [("0", 0), ("1", 2)])
def test_no_second_python_is_a_failure_only_where_everything_is_required(required: str, code: int) -> None:
    done = subprocess.run(
        ["make", "test-newest", "PYTHON_NEWEST="],
        cwd=ROOT,
        env={**os.environ, "A3PO_REQUIRE_ALL": required},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "!!! test-newest did NOT run" in done.stderr
    assert done.returncode == code  # make's own code for a failed recipe is 2
