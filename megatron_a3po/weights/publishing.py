"""The versions of the weights that engines can load: directories `version-<n>`, the newest few of them kept."""

import shutil
from pathlib import Path

PREFIX = "version-"


def version_directory(root: Path, version: int) -> Path:
    return root / f"{PREFIX}{version}"


def forget_old_versions(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` versions. An engine that was about to read an older one takes a newer."""
    versions = sorted(
        int(path.name.removeprefix(PREFIX))
        for path in root.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit()
    )
    for version in versions[:-keep]:
        shutil.rmtree(version_directory(root, version), ignore_errors=True)
