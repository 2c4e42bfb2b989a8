"""Twenty replayed steps: the golden run kept in the repository, and bfloat16 against it.

The golden numbers change where the mathematics does, and only there. When that is meant:

    python -m pytest tests/actor/test_replayed_curves.py --regenerate-golden
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.actor.replay import Outcome, layout, replay

GOLDEN = Path(__file__).parent.parent / "golden" / "replayed_steps.json"
RATE = "actor.lr=1e-4"
CURVES = ("loss", "grad_norm")
# Of the largest value. Other layouts and micro-batches stay at 4e-7 over the 20 steps, and so should another CPU.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def curves(long_config: Path) -> Outcome:
    return replay(long_config, "float32", RATE)


def test_golden_run(curves: Outcome, request: pytest.FixtureRequest):
    found = {name: curves.column(name) for name in CURVES}
    if request.config.getoption("--regenerate-golden"):
        rounded = {name: [float(f"{value:.9g}") for value in values] for name, values in found.items()}
        GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name in CURVES:
        scale = np.abs(golden[name]).max()
        np.testing.assert_allclose(found[name], golden[name], rtol=0, atol=TOLERANCE * scale, err_msg=name)


def test_bfloat16_follows_float32(curves: Outcome, long_config: Path):
    """Within 2% of the curve: the norm of the difference over the 20 steps against the norm of float32's losses.

    A step's loss is a difference of gains and losses and may be near zero, no scale for its own error: the curve is
    compared as a whole. Both runs start from weights that bfloat16 holds exactly, as published checkpoints are.
    """
    half = replay(long_config, "bfloat16", RATE, *layout(tp=2, pp=2), "actor.bf16=true")
    loss = curves.column("loss")
    assert len(loss) == 20
    distance = np.linalg.norm(half.column("loss") - loss) / np.linalg.norm(loss)
    print(f"bfloat16 is {distance:.2%} away")
    assert distance < 0.02
