"""The streaming writer: other readers read it, files are split by size, nothing half-written keeps the final name."""

import json
import os
import resource
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_a3po.errors import OutputError
from megatron_a3po.weights import aside
from megatron_a3po.weights.hugging_face import write_hugging_face
from megatron_a3po.weights.manifest import damage
from megatron_a3po.weights.safetensors_file import Announced, SafetensorsFile
from tests.distributed.ranks import RanksFailed, run_ranks

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16),
    "c.count": torch.tensor(7),
    "d.empty": torch.zeros(0, 4),
    "e.half": torch.randn(5, 2).half(),
    "f.flag": torch.tensor([True, False]),
    "g.strided": torch.arange(12.0).reshape(3, 4).T,
}


def announced(tensors: dict[str, Tensor]) -> list[Announced]:
    return [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def blocks(number: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As many tensors of 4,000 bytes in float32."""
    return {f"block.{i}": torch.full((10, 100), i, dtype=dtype) for i in range(number)}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2", "dtype": "bfloat16"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("weights that do not go along")
    return folder


def write(
    directory: Path,
    template: Path,
    tensors: dict[str, Tensor],
    *,
    lasting: bool = True,
    max_bytes: int = 10**9,
) -> None:
    write_hugging_face(
        tensors.items(),
        announced(tensors),
        directory,
        template=template,
        peers=None,
        lasting=lasting,
        max_shard_bytes=max_bytes,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_librarys_reader_reads_what_is_written(tmp_path: Path):
    path = tmp_path / "one.safetensors"
    with SafetensorsFile(path, announced(TENSORS), with_checksum=False) as file:
        for name, tensor in TENSORS.items():
            file.append(name, tensor)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_the_bytes_are_the_librarys_own(tmp_path: Path):
    tensors = {"x": torch.randn(3, 5), "y": torch.randn(2)}  # in the library's order: by dtype, then by name
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "ours", announced(tensors), with_checksum=True) as file:
        for name, tensor in tensors.items():
            file.append(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_was_not_announced_is_refused(tmp_path: Path):
    with SafetensorsFile(tmp_path / "x", announced(TENSORS), with_checksum=False) as file:
        with pytest.raises(AssertionError, match=r"g\.strided .* came where .*a\.weight"):
            file.append("g.strided", TENSORS["g.strided"])
        with pytest.raises(AssertionError, match="was announced"):
            file.append("a.weight", TENSORS["a.weight"].half())


def test_files_are_split_by_size_and_indexed(tmp_path: Path, template: Path):
    tensors = blocks(5) | {"large": torch.zeros(10, 300)}
    write(tmp_path / "out", template, tensors, max_bytes=9_000)
    found = {path.name: load_file(path).keys() for path in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert found == {
        "model-00001-of-00004.safetensors": {"block.0", "block.1"},
        "model-00002-of-00004.safetensors": {"block.2", "block.3"},
        "model-00003-of-00004.safetensors": {"block.4"},
        "model-00004-of-00004.safetensors": {"large"},
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 4_000 + 12_000}
    assert index["weight_map"] == {name: file for file, held in found.items() for name in held}


def test_the_configuration_says_what_was_written(tmp_path: Path, template: Path):
    write(tmp_path / "single", template, blocks(2))
    assert json.loads((tmp_path / "single" / "config.json").read_text()) == {
        "model_type": "qwen2",
        "dtype": "float32",
    }
    (template / "config.json").write_text('{"torch_dtype": "float32"}')
    tensors = blocks(2, torch.bfloat16) | {"one bias in full": torch.zeros(3)}
    write(tmp_path / "half", template, tensors)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert "pytorch_model.bin" not in names(tmp_path / "half")


def test_the_manifest_tells_a_changed_byte(tmp_path: Path, template: Path):
    out = tmp_path / "out"
    write(out, template, blocks(3), max_bytes=5_000)
    assert {"tokenizer.json", "generation_config.json", "manifest.json"} < names(out)
    assert damage(out, 1) is None
    file = out / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert damage(out, 1) == f"{file.name} has another checksum"


def test_what_only_engines_read_has_no_tokenizer_and_no_manifest(tmp_path: Path, template: Path):
    write(tmp_path / "version-3", template, blocks(1), lasting=False)
    assert names(tmp_path / "version-3") == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }


def test_what_was_there_is_replaced_and_leftovers_are_removed(tmp_path: Path, template: Path):
    out, left_over = tmp_path / "out", tmp_path / "out.tmp"
    for folder in (out, left_over):
        folder.mkdir()
        (folder / "old.safetensors").write_text("old")
    write(out, template, blocks(1))
    assert "old.safetensors" not in names(out)
    assert names(tmp_path) == {"template", "out"}


def test_what_is_replaced_is_whole_at_every_moment(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where names cannot be exchanged in one step a writer ends at one rename after the other: one of three names
    always has the old or the new weights whole."""
    out, replaced = tmp_path / "out", tmp_path / "out.old.tmp"
    write(out, template, blocks(1))
    whole, rename = names(out), Path.rename
    for moment in range(2):
        left = iter(range(moment))

        def ends(path: Path, target: Path, left: Iterator[int] = left) -> Path:
            if next(left, None) is None:
                os._exit(0)
            return rename(path, target)

        def on_rank(rank: int, world_size: int, ends: Any = ends) -> None:
            monkeypatch.setattr(Path, "rename", ends)
            monkeypatch.setattr(aside, "_exchange", lambda one, other: False)
            write(out, template, blocks(2))

        with pytest.raises(RanksFailed):
            run_ranks(on_rank, 1, joined=False)
        old = out if moment == 0 else replaced
        assert names(tmp_path) == {"template", old.name, "out.tmp"}
        assert names(old) == names(tmp_path / "out.tmp") == whole
        assert damage(old, 1) is None
        assert damage(tmp_path / "out.tmp", 1) is None
    write(out, template, blocks(2))
    assert names(tmp_path) == {"template", "out"}


def test_a_name_that_is_taken_is_said_so(tmp_path: Path, template: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(
        OutputError, match=r"out\.tmp cannot be renamed to .*out \(Not a directory\); choose an"
    ):
        write(tmp_path / "out", template, blocks(1))
    assert names(tmp_path) == {"template", "out"}


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, template: Path):
    """On every rank alike, whichever rank's disk it was, and gathering goes on for the others."""

    def on_rank(rank: int, world_size: int) -> tuple[str, int]:
        import torch.distributed as dist

        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # a write beyond the limit is then an error, as on a full disk
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        taken = []

        def gathered() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in blocks(30).items():
                dist.barrier()  # stuck here, were a rank to stop gathering
                taken.append(name)
                yield f"{rank}.{name}", tensor

        own = [Announced(f"{rank}.{one.name}", one.shape, one.dtype) for one in announced(blocks(30))]
        with pytest.raises(OutputError) as caught:
            write_hugging_face(
                gathered(),
                own,
                tmp_path / "out",
                template=template,
                peers=dist.group.WORLD,
                lasting=True,
                max_shard_bytes=40_000 if rank == 0 else 10**9,
            )
        return str(caught.value), len(taken)

    outcomes = run_ranks(on_rank, 2)
    sentence = f"{tmp_path}/out.tmp/model-00004-of-00004.safetensors cannot be written (File too large)"
    for message, taken in outcomes:
        assert sentence in message
        assert "free some space" in message
        assert taken == 30
    assert names(tmp_path) == {"template"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, template: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*cannot be written \(Not a directory\)"):
        write(tmp_path / "file" / "out", template, blocks(1))


def test_a_writer_that_is_killed_leaves_nothing_under_the_final_name(tmp_path: Path, template: Path):
    def on_rank(rank: int, world_size: int) -> None:
        def tensors() -> Iterator[tuple[str, Tensor]]:
            for number, one in enumerate(blocks(10).items()):
                if number == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield one

        own = announced(blocks(10))
        write_hugging_face(tensors(), own, tmp_path / "out", template=template, peers=None, lasting=True)

    with pytest.raises(RanksFailed, match="exit code -9"):
        run_ranks(on_rank, 1, joined=False)
    assert names(tmp_path) == {"template", "out.tmp"}
    write(tmp_path / "out", template, blocks(1))
    assert names(tmp_path) == {"template", "out"}


def test_one_tensor_is_held_at_a_time(tmp_path: Path, template: Path):
    """40 tensors of 4 MB: what is alive at once, as tensors that were handed out and not freed."""
    alive, most = 0, 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal alive, most

        def gone() -> None:
            nonlocal alive
            alive -= 1

        for number in range(40):
            tensor = torch.zeros(1_000_000)
            weakref.finalize(tensor, gone)
            alive += 1
            most = max(most, alive)
            yield f"block.{number}", tensor
            del tensor

    own = [Announced(f"block.{number}", (1_000_000,), torch.float32) for number in range(40)]
    write_hugging_face(tensors(), own, tmp_path / "out", template=template, peers=None, lasting=False)
    assert most <= 2
