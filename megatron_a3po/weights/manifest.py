"""A directory's manifest: sizes and checksums of its files, so that whoever reads them later can tell they are whole.

One `manifest.json` for trainer checkpoints, exports and converted checkpoints alike.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_a3po.errors import InputError

MANIFEST = "manifest.json"
CHECKED_BYTES = 16 << 30  # some ten seconds of one core, less of several
SMALL_BYTES = 64 << 20


def write_manifest(directory: Path, format_number: int, known: Mapping[str, str] | None = None) -> None:
    """List every file under `directory`. known: checksums found while writing, by name, which saves reading again."""
    known = known or {}
    files = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or checksum(path)}
    (directory / MANIFEST).write_text(json.dumps({"format": format_number, "files": files}, indent=1))


def damage(directory: Path, format_number: int) -> str | None:
    """What is wrong with a directory by its manifest; None if it is whole.

    Every size is compared, then the checksums as far as that is cheap: of everything up to CHECKED_BYTES, of a larger
    directory only of its files up to SMALL_BYTES. `check_input` leaves nothing out.
    Errors: InputError where it is of another format, which is no damage.
    """
    try:
        manifest: Any = json.loads(_read(directory / MANIFEST))
        if not _is_manifest(manifest):
            return f"{MANIFEST} lists no files with their sizes and checksums"
        if manifest["format"] != format_number:
            raise InputError(
                f"{directory} is in format {manifest['format']}, this program reads format {format_number}: take the "
                "version of the program that wrote it"
            )
        return _difference(directory, manifest["files"])
    except OSError as error:
        return f"{os.path.relpath(error.filename or MANIFEST, directory)} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{MANIFEST}: {error}"


def _difference(directory: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that is another than listed. Errors: OSError names a file that cannot be read."""
    for name, expected in files.items():
        if _size(directory / name) != expected["bytes"]:
            return f"{name} is missing or cut short"
    total = sum(expected["bytes"] for expected in files.values())
    checked = [name for name, one in files.items() if total <= CHECKED_BYTES or one["bytes"] <= SMALL_BYTES]
    with ThreadPoolExecutor() as threads:  # hashing and reading let other threads run
        found = dict(zip(checked, threads.map(lambda name: checksum(directory / name), checked), strict=True))
    for name in checked:
        if found[name] != files[name]["sha256"]:
            return f"{name} has another checksum"
    return None


def _is_manifest(found: Any) -> bool:
    """Whether it has the shape of what `write_manifest` writes, and lists anything."""
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        return False
    files = found.get("files")
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            isinstance(one, dict) and type(one.get("bytes")) is int and isinstance(one.get("sha256"), str)
            for one in files.values()
        )
    )


def check_input(directory: Path) -> None:
    """Every file under `directory` that a manifest knows is as it was written; where there is no manifest, all are.

    That of a run's checkpoint lies beside `actor/`. Sizes are compared before anything is read.
    Errors: InputError names the files that are not.
    """
    directory = directory.resolve()
    own, run = directory / MANIFEST, directory.parent / MANIFEST
    if own.is_file():
        files = _listed(own)
    elif directory.name == "actor" and run.is_file():
        files = {name: one for name, one in _listed(run).items() if name.startswith("actor/")}
        directory = directory.parent
    else:
        return
    mend = f"copy it again, or remove {MANIFEST} if it was changed on purpose"
    whole = {name: one for name, one in files.items() if _size(directory / name) == one["bytes"]}
    if len(whole) == len(files):
        whole = {name: one for name, one in files.items() if checksum(directory / name) == one["sha256"]}
        what = "has another checksum than"
    else:
        what = "is missing or has another size than"
    if len(whole) < len(files):
        raise InputError(
            f"{directory / name} {what} in {MANIFEST}: {mend}" for name in files if name not in whole
        )


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _listed(manifest: Path) -> dict[str, dict[str, Any]]:
    """Its files, with bytes and sha256 of each; of a file of that name which is no such manifest, none."""
    try:
        found: Any = json.loads(_read(manifest))
    except (OSError, ValueError) as error:
        raise InputError(f"{manifest} cannot be read ({error}): copy it again, or remove it") from None
    is_ours = isinstance(found, dict) and "format" in found and isinstance(found.get("files"), dict)
    if is_ours and found["files"] and not _is_manifest(found):
        raise InputError(
            f"{manifest} lists files without their sizes and checksums: copy it again, or remove it"
        )
    return found["files"] if is_ours else {}


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes. Errors: OSError names the file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # of a read it names nothing
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read(manifest: Path) -> bytes:
    try:
        return manifest.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(manifest)) from None
