"""The conversion command where it must not go on: bad input, folders in the way, a full disk, kills and interrupts."""

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_a3po.weights.aside import WrittenFile
from megatron_a3po.weights.manifest import write_manifest
from megatron_a3po.weights.megatron_reader import MegatronReader
from tests.distributed.ranks import RanksFailed
from tests.tools.conversion import command, commands, names
from tests.weights.test_round_trip import assert_identical, tensors_of
from tools import convert_checkpoint

# Megatron-Core 0.19's own calls of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
]


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
        (["hf-to-megatron", bare, out], "no *.safetensors: give the folder of a Hugging Face checkpoint.\n"),
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
