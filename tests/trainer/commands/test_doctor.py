"""What doctor concludes from what it finds; the command itself is run in tests/test_main.py."""

from pathlib import Path

import pytest

from megatron_a3po.trainer.commands.doctor import Machine, has_nvidia_apex, packages, paths

CPU = Machine(gpus=(), torch="2.13.0", megatron_core="0.16.1", transformer_engine=None, has_apex=False)
GPU = Machine(gpus=("H200",), torch="2.13.0", megatron_core="0.19.2", transformer_engine="2.9", has_apex=True)
BARE_GPU = Machine(
    gpus=("H200",), torch="2.13.0", megatron_core="0.19.2", transformer_engine=None, has_apex=True
)


@pytest.mark.parametrize(
    ("machine", "part", "path"),
    [
        (CPU, "communication", "gloo"),
        (CPU, "attention", "SDPA"),
        (CPU, "optimizer", "torch's AdamW"),
        (GPU, "communication", "NCCL"),
        (GPU, "attention", "Transformer Engine"),
        (GPU, "optimizer", "Transformer Engine's FusedAdam"),
        (BARE_GPU, "attention", "varlen_attn"),
        (BARE_GPU, "optimizer", "Apex's FusedAdam"),
    ],
)
def test_paths(machine: Machine, part: str, path: str):
    assert path in dict(paths(machine))[part]


def test_the_apex_of_pypi_is_not_nvidias(tmp_path: Path):
    (tmp_path / "lib").mkdir()
    assert not has_nvidia_apex([str(tmp_path)])
    (tmp_path / "optimizers").mkdir()
    assert has_nvidia_apex([str(tmp_path)])


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.16.1", True), ("0.19.2", True), ("0.16.0", False), ("0.20.0", False), ("0.19.0rc1", True)],
)
def test_supported_megatron_core(version: str, supported: bool):
    machine = Machine((), "2.13.0", version, None, False)
    assert ("outside" not in dict(packages(machine))["Megatron-Core"]) == supported


def test_without_anything():
    machine = Machine((), None, None, None, False)
    assert "nothing can be trained" in dict(packages(machine))["torch"]
    assert "nothing can be trained" in dict(packages(machine))["Megatron-Core"]
