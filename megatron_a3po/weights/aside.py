"""A directory written beside its final name and renamed: whoever sees the final name sees all of it.

A writer that is killed leaves `<name>.tmp`, which the next one to write there removes. What is replaced changes places
with it in one step of the kernel, so the name is never absent. Where the file system knows no such step, the old steps
aside as `<name>.old.tmp` for the moment between two renames: a writer killed in just that moment leaves no `<name>`,
but both contents whole beside it; `put_back` gives the old one its name again.
"""

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from megatron_a3po.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REPLACED, REMOVED = ".old.tmp", ".removed.tmp"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def aside_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".tmp")


def replaced_of(directory: Path) -> Path:
    return directory.with_name(directory.name + REPLACED)


def open_aside(directory: Path) -> Path:
    """An empty directory to write into."""
    aside = aside_of(directory)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def close_aside(directory: Path) -> None:
    """Give what was written its final name, which is never that of something half removed, and is never absent."""
    put_in_place(aside_of(directory), directory)


def put_in_place(aside: Path, directory: Path) -> None:
    """Give `aside` the name `directory`; what had it is removed."""
    replaced = replaced_of(directory)
    if not directory.is_dir() or directory.is_symlink():
        aside.rename(directory)
    elif _exchange(aside, directory):
        shutil.rmtree(aside, ignore_errors=True)
    else:
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
        aside.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Whatever in `folder` had stepped aside gets its name again, where nothing has it: its writer was killed. Only for
    who has the folder to itself."""
    for replaced in folder.glob(f"*{REPLACED}"):
        name = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not name.exists():
            replaced.rename(name)


def remove(directory: Path) -> None:
    """Its name goes first: nobody sees half of it. What cannot be removed stays, as `<name>.removed.tmp` at most."""
    removed = directory.with_name(directory.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(OSError):
        directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where this system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2) and renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def make_durable(directory: Path) -> None:
    """Every file under `directory`, and what its folders list, is on the disk when this returns."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """A file, or the names a folder lists, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def drop_aside(directory: Path) -> None:
    shutil.rmtree(aside_of(directory), ignore_errors=True)


def write_aside(path: Path, text: str) -> None:
    """Write a small file so that whoever reads it sees all of it or the one before, also after a power failure."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text)
        sync(aside)
        aside.rename(path)
        sync(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def what_failed(error: OSError, path: Path) -> str:
    """In words. path: what was being written, for errors that name nothing."""
    what = f"{error.filename or path} cannot be written"
    if error.filename2:
        what = f"{error.filename} cannot be renamed to {error.filename2}"
    return f"{what} ({error.strerror})"


@contextmanager
def noting(problems: list[str], directory: Path) -> Iterator[None]:
    """Writes that fail become sentences, so that a rank can tell the others instead of leaving them waiting."""
    try:
        yield
    except OSError as error:
        mend = "free some space or choose another folder" if error.errno in FULL else "choose another folder"
        problems.append(f"{what_failed(error, aside_of(directory))}; {mend}")


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Errors: OutputError where `path`, or what is below it, cannot be written."""
    problems: list[str] = []
    with noting(problems, path):
        yield
    if problems:
        raise OutputError(problems)


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """For one process: an empty directory that gets its final name in the end, or leaves nothing.

    Errors: OutputError where a file cannot be written.
    """
    try:
        with telling(directory):
            yield open_aside(directory)
            close_aside(directory)
    finally:
        drop_aside(directory)


class WrittenFile:
    """A file that is only appended to; a failed write names it, and its checksum needs no second reading."""

    def __init__(self, path: Path, *, with_checksum: bool) -> None:
        self.path, self._sha256 = path, hashlib.sha256() if with_checksum else None
        self._file = path.open("wb")
        self.failure: OSError | None = None  # for who is told of it by a library, in other words

    def write(self, data: bytes | memoryview) -> int:
        with self._named():
            self._file.write(data)
        if self._sha256:
            self._sha256.update(data)
        return len(data)

    def flush(self) -> None:
        with self._named():
            self._file.flush()

    def sync(self) -> None:
        """What has been written is on the disk when this returns."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())

    def tell(self) -> int:
        return self._file.tell()

    @property
    def checksum(self) -> str | None:
        """Of what has been written, where asked for."""
        return self._sha256.hexdigest() if self._sha256 else None

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(self.path))
            raise self.failure from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._named():
            self._file.close()
