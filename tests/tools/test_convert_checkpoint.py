"""The conversion command as a user runs it: every family there and back, what is refused, what is told apart.

Commands run in forked processes: verify joins a process group and changes torch where there is no GPU.
"""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from megatron_a3po.actor import checkpoint
from megatron_a3po.actor.actor import Actor
from megatron_a3po.actor.optimizer import Schedule
from megatron_a3po.config import read_model_shape
from megatron_a3po.weights.aside import WrittenFile
from megatron_a3po.weights.families import FAMILIES
from megatron_a3po.weights.manifest import damage, write_manifest
from megatron_a3po.weights.megatron_reader import MegatronReader
from tests.actor.ranks import on_actors
from tests.distributed.ranks import RanksFailed, run_ranks
from tests.weights.checkpoints import COMMON, DENSE, write_checkpoint, write_dense
from tests.weights.test_expert_families import COMMON as EXPERTS_COMMON
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
RANKS = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]
TOOL = Path(convert_checkpoint.__file__)


@dataclass
class Ended:
    code: int
    output: str
    error: str


def commands(*argvs: list[Any], prepare: Any = None) -> list[Ended]:
    """The commands one after the other in one forked process, which `prepare` is called in first."""

    def on_rank(rank: int, world_size: int) -> list[Ended]:
        if prepare is not None:
            prepare()
        return [_ended([str(argument) for argument in argv]) for argv in argvs]

    return run_ranks(on_rank, 1, joined=False)[0]


def _ended(argv: list[str]) -> Ended:
    output, error = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(error):
        code = convert_checkpoint.main(argv)
    return Ended(code, output.getvalue(), error.getvalue())


def command(*argv: Any, prepare: Any = None) -> Ended:
    return commands(list(argv), prepare=prepare)[0]


def qwen2_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**COMMON, **changes})


def write_family(folder: Path, family: str) -> Path:
    if family in DENSE:
        return write_dense(folder, family)
    config, keys = EXPERTS[family]
    write_checkpoint(folder, config(**EXPERTS_COMMON, **keys))
    for file in folder.glob("*.safetensors"):  # buffers, which start as zeros
        tensors = load_file(file)
        biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
        tensors |= {name: torch.randn(tensors[name].shape) * 0.05 for name in biases}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "qwen2", qwen2_config())


@pytest.fixture(scope="module")
def converted(qwen2: Path) -> Path:
    """The same for TP 2 x PP 2."""
    output = qwen2.with_name("qwen2-megatron")
    assert command("hf-to-megatron", qwen2, output, *RANKS).code == 0
    return output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]"])
def test_inspect_names_a_damaged_configuration(qwen2: Path, converted: Path, tmp_path: Path, text: bytes):
    folder, megatron = (Path(shutil.copytree(one, tmp_path / one.name)) for one in (qwen2, converted))
    files = [folder / "config.json", megatron / "hugging_face" / "config.json"]
    for file in files:
        file.write_bytes(text)
    for file, one in zip(files, commands(["inspect", folder], ["inspect", megatron]), strict=True):
        assert one.code == 2
        assert one.error.startswith(f"{file} ")
        assert "JSON" in one.error


def test_bad_input_is_a_sentence(qwen2: Path, converted: Path, tmp_path: Path):
    damaged = Path(shutil.copytree(qwen2, tmp_path / "damaged"))
    os.truncate(damaged / "model.safetensors", 30_000)
    cut = Path(shutil.copytree(converted, tmp_path / "cut"))
    os.truncate(cut / "__1_0.distcp", 20_000)
    unlisted = Path(shutil.copytree(cut, tmp_path / "unlisted"))
    (unlisted / "manifest.json").unlink()
    unknown = Path(shutil.copytree(converted, tmp_path / "unknown"))
    shutil.rmtree(unknown / "hugging_face")
    bare = Path(shutil.copytree(qwen2, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    strange = Path(shutil.copytree(qwen2, tmp_path / "strange"))
    (strange / "config.json").write_text('{"model_type": "mamba"}')
    before, out = names(tmp_path), tmp_path / "out"
    cases: list[tuple[list[Any], str]] = [
        (["hf-to-megatron", tmp_path / "nowhere", out], "nowhere is not a folder"),
        (["hf-to-megatron", damaged, out], "model.safetensors is cut short"),
        (["hf-to-megatron", strange, out], 'model_type is "mamba", but only these are supported'),
        (["hf-to-megatron", qwen2, out, "--pipeline-model-parallel-size=3"], "does not divide the 4 layers"),
        (["hf-to-megatron", qwen2, out, "--tensor-model-parallel-size=5"], "does not divide"),
        (["hf-to-megatron", qwen2, converted], f"{converted} exists already"),
        (["hf-to-megatron", qwen2, qwen2.parent, "--overwrite"], "holds what is to be converted"),
        (["megatron-to-hf", qwen2, out], "no distributed checkpoint"),
        (["hf-to-megatron", qwen2, out, "--expert-model-parallel-size=2"], "has no experts"),
        (["hf-to-megatron", bare, out], "no *.safetensors: give the folder of a Hugging Face checkpoint\n"),
        (["megatron-to-hf", cut, out], f"{cut}/__1_0.distcp is missing or has another size than in manifest"),
        (["megatron-to-hf", unlisted, out], "cannot be read"),
        (["megatron-to-hf", unknown, out], "put the model's config.json and tokenizer there"),
        (["inspect", tmp_path], "is no checkpoint"),
        (["verify", qwen2, tmp_path], "config.json"),
        (["verify", qwen2, converted, "--prompt", "hello"], "--prompt needs a tokenizer"),
    ]
    for (argv, says), ended in zip(cases, commands(*(argv for argv, _ in cases)), strict=True):
        assert ended.code == 2, (argv, ended)
        assert says in ended.error
        assert "Traceback" not in ended.error
        assert ("━" in ended.error) == (unlisted in argv)  # the others before anything is converted
    assert names(tmp_path) == before


def test_a_changed_byte_is_found_by_the_manifest(qwen2: Path, converted: Path, tmp_path: Path):
    def flip(folder: Path, file: str) -> Path:
        data = bytearray((folder / file).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)
        return folder

    folder, back, out, step = (tmp_path / name for name in ("megatron", "back", "out", "step-3"))
    assert command("megatron-to-hf", converted, back).code == 0
    whole = Path(shutil.copytree(converted, step / "actor"))
    (whole / "manifest.json").unlink()
    (step / "rollouts.json").write_text("{}")
    write_manifest(step, 2)
    (step / "rollouts.json").write_text("[]")  # no input of a conversion
    shutil.copytree(converted, folder)
    changed = flip(folder, "__2_0.distcp")
    weights = flip(back, "model-00001-of-00001.safetensors")
    ended = commands(
        ["megatron-to-hf", changed, out],
        ["hf-to-megatron", weights, out],
        ["megatron-to-hf", step, tmp_path / "of-a-run"],
    )
    assert [one.code for one in ended] == [2, 2, 0], ended
    assert f"{changed}/__2_0.distcp has another checksum than in manifest.json" in ended[0].error
    assert f"{weights}/model-00001-of-00001.safetensors has another checksum" in ended[1].error
    flip(step / "actor", "__3_0.distcp")
    for path in (step, step / "actor"):
        one = command("megatron-to-hf", path, out)
        assert (one.code, f"{step}/actor/__3_0.distcp has another checksum" in one.error) == (2, True)
    (step / "manifest.json").write_text("{")
    one = command("megatron-to-hf", step, out)
    assert (one.code, f"{step}/manifest.json cannot be read" in one.error) == (2, True)
    assert not out.exists()


def test_a_checkpoint_or_an_empty_folder_is_replaced_when_asked(qwen2: Path, converted: Path, tmp_path: Path):
    out = Path(shutil.copytree(qwen2, tmp_path / "out"))
    (out / "old").write_text("")
    left_over = tmp_path / "out.old.tmp"
    left_over.mkdir()
    ended = commands(["megatron-to-hf", converted, out], ["megatron-to-hf", converted, out, "--overwrite"])
    assert [one.code for one in ended] == [2, 0]
    assert names(tmp_path) == {"out"}
    assert "old" not in names(out)
    assert_identical(tensors_of(out), tensors_of(qwen2))
    shutil.rmtree(out)
    out.mkdir()
    assert command("hf-to-megatron", qwen2, out, "--overwrite", prepare=lambda: os.chdir(out)).code == 0
    assert command("hf-to-megatron", qwen2, ".", "--overwrite", prepare=lambda: os.chdir(out)).code == 0
    assert names(tmp_path) == {"out"}


def test_nothing_but_a_checkpoint_is_replaced_and_never_the_input(
    qwen2: Path, converted: Path, tmp_path: Path
):
    out, work = tmp_path / "out", tmp_path / "work"
    (work / "here").mkdir(parents=True)
    (work / "thesis.txt").write_text("three years")
    (tmp_path / "link").symlink_to(work / "here")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    sources = [Path(shutil.copytree(qwen2, f"{out}{end}")) for end in (".tmp", ".old.tmp")]
    inner = Path(shutil.copytree(converted, tmp_path / "megatron.tmp" / "inner"))
    step = tmp_path / "step-3"
    shutil.copytree(converted, step / "actor")
    cases: list[tuple[list[Any], str]] = [
        *((["hf-to-megatron", source, out], "holds what is to be converted") for source in sources),
        (["megatron-to-hf", inner, tmp_path / "megatron"], "holds what is to be converted"),
        (["megatron-to-hf", step, step / "actor", "--overwrite"], "holds what is to be converted"),
        (["megatron-to-hf", converted, "/", "--overwrite"], "holds what is to be converted"),
        (["hf-to-megatron", qwen2, work, "--overwrite"], "work is no checkpoint"),
        (["hf-to-megatron", qwen2, "..", "--overwrite"], ".. is no checkpoint"),
        (["megatron-to-hf", converted, work / "thesis.txt", "--overwrite"], "thesis.txt is no folder"),
        (["megatron-to-hf", converted, tmp_path / "link", "--overwrite"], "link is no folder"),
        (["megatron-to-hf", converted, tmp_path / "nowhere"], "nowhere is no folder"),
    ]
    before = sorted(tmp_path.rglob("*"))
    ended = commands(*(argv for argv, _ in cases), prepare=lambda: os.chdir(work / "here"))
    for (argv, says), one in zip(cases, ended, strict=True):
        assert one.code == 2, (argv, one)
        assert says in one.error
        assert "━" not in one.error
    assert sorted(tmp_path.rglob("*")) == before


def limit_files() -> None:
    """Writes beyond 60 kB fail, as they would on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_leaves_nothing(qwen2: Path, converted: Path, tmp_path: Path):
    ended = commands(
        ["hf-to-megatron", qwen2, tmp_path / "megatron"],
        ["megatron-to-hf", converted, tmp_path / "hf"],
        prepare=limit_files,
    )
    for one, file in zip(ended, ("__0_0.distcp", "model-00001-of-00001.safetensors"), strict=True):
        assert one.code == 3
        assert f"{file} cannot be written (File too large)" in one.error
        assert "Traceback" not in one.error
    assert names(tmp_path) == set()


def die_while_writing() -> None:
    write = WrittenFile.write

    def dies(self: WrittenFile, data: bytes | memoryview) -> int:
        if self.tell() > 30_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    WrittenFile.write = dies


def test_a_killed_conversion_leaves_nothing_under_the_final_name(
    qwen2: Path, converted: Path, tmp_path: Path
):
    for argv in (["hf-to-megatron", qwen2], ["megatron-to-hf", converted]):
        output = tmp_path / argv[0]
        with pytest.raises(RanksFailed, match="exit code -9"):
            command(*argv, output, prepare=die_while_writing)
        assert not output.exists()
        assert names(tmp_path) >= {f"{output.name}.tmp"}
        assert command(*argv, output).code == 0
        assert not output.with_name(f"{output.name}.tmp").exists()


def test_an_interrupt_is_no_other_error_and_leaves_nothing(qwen2: Path, converted: Path, tmp_path: Path):
    def interrupt_inside_torch() -> None:
        # Behind a shell's `&` ctrl-C is ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        write = WrittenFile.write

        def interrupted(self: WrittenFile, data: bytes | memoryview) -> int:
            if self.tell() > 30_000:
                os.kill(os.getpid(), signal.SIGINT)
            return write(self, data)

        WrittenFile.write = interrupted

    for argv in (["hf-to-megatron", qwen2], ["megatron-to-hf", converted]):
        ended = command(*argv, tmp_path / "out", prepare=interrupt_inside_torch)
        assert ended.code == 130, ended
        assert ended.error.endswith("interrupted\n")
        assert "Traceback" not in ended.error
        assert names(tmp_path) == set()


def test_what_nobody_foresaw_is_not_taken_for_a_difference(converted: Path):
    def break_reading() -> None:
        MegatronReader.tensors = property(lambda self: 1 / 0)  # pyright: ignore[reportAttributeAccessIssue]

    ended = command("inspect", converted, prepare=break_reading)
    assert ended.code == 3
    assert "ZeroDivisionError" in ended.error


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--tensor-model-parallel-size=0", "0 is no whole number from 1 on"),
        ("--pipeline-model-parallel-size=two", "two is no whole number from 1 on"),
        ("--max-shard-gb=0", "0 is no finite number above 0"),
        ("--max-shard-gb=-1", "-1 is no finite number above 0"),
        ("--max-shard-gb=nan", "nan is no finite number above 0"),
        ("--max-shard-gb=inf", "inf is no finite number above 0"),
        ("--tolerance=nan", "nan is no number from 0 on"),
        ("--tolerance=little", "little is no number"),
    ],
)
def test_numbers_that_make_no_sense(option: str, says: str, capsys: pytest.CaptureFixture[str]):
    commands_of = {"--m": "megatron-to-hf", "--t": "verify"}
    name = "hf-to-megatron" if "parallel" in option else commands_of[option[:3]]
    with pytest.raises(SystemExit) as ended:
        convert_checkpoint.main([name, "a", "b", option])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


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
        _ended(["inspect", str(source)])  # what is loaded once stays
        return [
            peak_while(lambda: _ended(["hf-to-megatron", str(source), str(tmp_path / "megatron")])),
            peak_while(
                lambda: _ended(["megatron-to-hf", str(tmp_path / "megatron"), str(tmp_path / "back")])
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
