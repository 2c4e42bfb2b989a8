"""The conversion command as a user runs it: every family there and back, what is refused, what is told apart.

Commands run in forked processes: verify joins a process group and changes torch where there is no GPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_a3po.actor import checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config import read_model_shape
from megatron_a3po.weights.families import FAMILIES
from megatron_a3po.weights.manifest import damage
from tests.actor.ranks import on_actors
from tests.distributed.ranks import run_ranks
from tests.tools.conversion import RANKS, command, commands, ended_by, qwen2_config, write_family
from tests.weights.checkpoints import DENSE, write_checkpoint
from tests.weights.test_expert_families import CONFIGS as EXPERTS
from tests.weights.test_round_trip import assert_identical, tensors_of
from tools import convert_checkpoint

# Megatron-Core 0.19's own calls of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
]
TOOL = Path(convert_checkpoint.__file__)


@pytest.mark.parametrize("family", [*DENSE, *EXPERTS])
def test_a_family_goes_there_and_back_bit_for_bit_and_computes_the_same(tmp_path: Path, family: str):
    source = write_family(tmp_path / "hf", family)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    experts = ["--expert-model-parallel-size=2"] if family in EXPERTS else []
    ended = commands(
        ["hf-to-megatron", source, megatron, *RANKS, *experts],
        ["megatron-to-hf", megatron, back],
        ["verify", source, megatron],
    )
    assert [one.code for one in ended] == [0, 0, 0], ended
    assert_identical(tensors_of(back), tensors_of(source))
    assert read_model_shape(back) == read_model_shape(source)
    assert damage(back, 1) is None
    assert damage(megatron, 1) is None
    assert len(list(megatron.glob("*.distcp"))) == (8 if family in EXPERTS else 4)
    assert "equal (tolerance 1e-05)" in ended[2].output
    assert "first divergence" not in ended[2].output
    assert ended[2].error == ""
    assert f"wrote {back}" in ended[1].output


def test_every_family_of_the_tables_is_tested():
    tested = {config.model_type for config, _ in [*DENSE.values(), *EXPERTS.values()]}
    assert tested == set(FAMILIES)


def test_precision_and_size_of_files_can_be_chosen(qwen2: Path, converted: Path, tmp_path: Path):
    half = tmp_path / "half"
    ended = command("megatron-to-hf", converted, half, "--dtype=bfloat16", "--max-shard-gb=0.00005")
    assert ended.code == 0, ended
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(qwen2).items()}
    assert_identical(tensors_of(half), expected)
    files = list(half.glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 60_000
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    cut = tmp_path / "cut"
    assert command("hf-to-megatron", qwen2, cut, "--dtype=bfloat16").code == 0
    assert json.loads((cut / "hugging_face" / "config.json").read_text())["dtype"] == "bfloat16"
    assert damage(cut, 1) is None


CHANGES = {
    "embedding": "model.embed_tokens.weight",
    "layer 0 attention": "model.layers.0.self_attn.q_proj.weight",
    "layer 2 attention": "model.layers.2.self_attn.o_proj.weight",
    "layer 3 MLP": "model.layers.3.mlp.down_proj.weight",
    "head": "lm_head.weight",
}


def changed(source: Path, folder: Path, tensor: str) -> Path:
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("where", CHANGES)
def test_verify_says_where_two_checkpoints_part(qwen2: Path, converted: Path, tmp_path: Path, where: str):
    other = changed(qwen2, tmp_path / "other", CHANGES[where])
    others = tmp_path / "others"
    made, *ended = commands(
        ["hf-to-megatron", other, others],
        ["verify", other, qwen2],
        ["verify", converted, other],
        ["verify", converted, others],
        ["verify", other, converted, "--tolerance=0.9"],
    )
    assert made.code == 0, made
    for one in ended[:3]:
        assert one.code == 1, one
        assert f"first divergence: {where} (" in one.output
        assert "different (tolerance 1e-05)" in one.output
    assert ended[3].code == 0
    assert "equal (tolerance 9e-01)" in ended[3].output


def test_verify_names_tensors_that_only_one_side_has(qwen2: Path, converted: Path, tmp_path: Path):
    tied = write_checkpoint(tmp_path / "tied", qwen2_config(tie_word_embeddings=True))
    narrow = write_checkpoint(tmp_path / "narrow", qwen2_config(intermediate_size=40))
    first, second = commands(["verify", tied, converted], ["verify", qwen2, narrow])
    assert (first.code, second.code) == (1, 1)
    assert f"only in {converted}: lm_head.weight" in first.output
    assert (
        f"model.layers.0.mlp.up_proj.weight is (80, 48) in {qwen2}, but (40, 48) in {narrow}" in second.output
    )


def test_inspect_tells_what_is_there(qwen2: Path, converted: Path):
    megatron, folder, every = commands(
        ["inspect", converted], ["inspect", qwen2], ["inspect", converted, "--all"]
    )
    for part in (
        "distributed checkpoint of Megatron-Core",
        "qwen2, 4 layers, hidden 48, vocabulary 99",
        "tensor_model_parallel_size=2, pipeline_model_parallel_size=2",
        "written by 4 ranks",
        "decoder.layers.*.mlp.linear_fc1.weight",
        "160 x 48",
    ):
        assert part in megatron.output
    assert "Hugging Face checkpoint" in folder.output
    assert "model.layers.*.mlp.up_proj.weight" in folder.output
    assert "decoder.layers.3.mlp.linear_fc1.weight" in every.output
    for line in (megatron.output + folder.output + every.output).splitlines():
        assert line == line.rstrip()


def test_inspect_tells_of_a_run(qwen2: Path, tmp_path: Path):
    step = tmp_path / "step-3"
    (step / "actor").mkdir(parents=True)

    def save(actor: Actor) -> None:
        actor.start_stage(Schedule(1e-3, 0.0, 0, "constant", 10))
        checkpoint.save(actor, step / "actor")

    on_actors(save, qwen2)
    (step / "trainer.json").write_text('{"step": 3}')
    alone = Path(shutil.copytree(step / "actor", tmp_path / "alone"))
    shutil.copy(step / "trainer.json", tmp_path)
    whole, beside, *ended = commands(["inspect", step], ["inspect", alone], ["inspect", step / "actor"])
    for one in (whole, *ended):
        assert one.code == 0, one
        words = [line.split() for line in one.output.splitlines()]
        assert ["step", "3"] in words
        assert ["version", "3"] in words
        assert "checkpoint of a run (distributed, Megatron-Core)" in one.output
        assert re.search(r"optimizer state +[1-9]\d* tensors, .* [kM]B\n", one.output)
        assert re.search(r"Megatron-Core +0\.\d+", one.output)
    assert "of a run" not in beside.output
    (step / "trainer.json").write_text("{}")
    assert "not said" in command("inspect", step).output
    (step / "trainer.json").write_text("3,")
    ended = command("inspect", step)
    assert (ended.code, "trainer.json is not readable as JSON" in ended.error) == (2, True)


def peak_while(work: Any) -> int:
    """How much more anonymous memory this process had at most while it worked, in bytes."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before, highest, done = held(), 0, False

    def look() -> None:
        nonlocal highest
        while not done:
            highest = max(highest, held())
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    work()
    done = True
    thread.join()
    return highest - before


def test_a_few_tensors_are_held_at_a_time(tmp_path: Path):
    config = qwen2_config(num_hidden_layers=24, hidden_size=256, intermediate_size=1024)
    source = write_checkpoint(tmp_path / "hf", config)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 90e6

    def on_rank(rank: int, world_size: int) -> list[int]:
        ended_by(["inspect", str(source)])  # what is loaded once stays
        return [
            peak_while(lambda: ended_by(["hf-to-megatron", str(source), str(tmp_path / "megatron")])),
            peak_while(
                lambda: ended_by(["megatron-to-hf", str(tmp_path / "megatron"), str(tmp_path / "back")])
            ),
        ]

    (peaks,) = run_ranks(on_rank, 1, joined=False)
    print([f"{peak / size:.2f} of the model" for peak in peaks])
    assert max(peaks) < 0.2 * size
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(source))


def test_the_script_itself(tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, TOOL, "megatron-to-hf", tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TOOL.parent.parent)},
    )
    assert ended.returncode == 2, ended.stderr
    assert "no distributed checkpoint of Megatron-Core" in ended.stderr
    assert "Traceback" not in ended.stderr
