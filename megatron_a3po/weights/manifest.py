"""A directory's manifest: sizes and checksums of its files, so that whoever reads them later can tell they are whole.

One `manifest.json` for trainer checkpoints, exports and converted checkpoints alike.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


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
    """What is wrong with a directory by its manifest; None if it is whole."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    if manifest.get("format") != format_number:
        return f"format {manifest.get('format')}, this program reads {format_number}"
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return f"{name} is missing or cut short"
        if checksum(path) != expected["sha256"]:
            return f"{name} has another checksum"
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
