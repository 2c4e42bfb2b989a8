"""What is replaced is never absent, and what is renamed is on the disk before."""

import os
import signal
from pathlib import Path

import pytest

from megatron_a3po.weights import aside
from megatron_a3po.weights.aside import make_durable, put_back, put_in_place


def new(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "content").write_text(content)
    return folder


def test_a_name_is_never_absent_while_it_is_replaced(tmp_path: Path) -> None:
    name, stop = new(tmp_path / "name", "0"), tmp_path / "stop"
    watcher = os.fork()
    if watcher == 0:
        absent = 0
        while not stop.exists():
            absent += not os.path.lexists(name)
        os._exit(bool(absent))
    for number in range(1, 400):
        put_in_place(new(tmp_path / "name.tmp", str(number)), name)
        assert (name / "content").read_text() == str(number)
    stop.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name", "stop"]


def test_it_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "RENAME_EXCHANGE", 1 << 20)  # which no file system knows
    name = new(tmp_path / "name", "old")
    put_in_place(new(tmp_path / "name.tmp", "new"), name)
    assert (name / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_what_stepped_aside_comes_back_after_a_kill_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "RENAME_EXCHANGE", 1 << 20)
    rename = Path.rename

    def killed_after(path: Path, target: Path) -> Path:
        rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    name, other = new(tmp_path / "name", "old"), new(tmp_path / "other", "here")
    new(tmp_path / "other.old.tmp", "older")
    written = new(tmp_path / "name.tmp", "new")
    if (writer := os.fork()) == 0:
        monkeypatch.setattr(Path, "rename", killed_after)
        put_in_place(written, name)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    assert not name.exists()
    put_back(tmp_path)
    assert (name / "content").read_text() == "old"
    assert (other / "content").read_text() == "here"


def test_all_of_a_directory_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new(tmp_path / "one", "a")
    new(tmp_path / "one" / "two", "b")
    synced, fsync = [], os.fsync

    def seen(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    make_durable(tmp_path / "one")
    one = str(tmp_path / "one")
    assert sorted(synced) == [one, f"{one}/content", f"{one}/two", f"{one}/two/content"]
    assert synced[-1] == one, "a folder after what is in it"
