"""The versions of the weights that engines can load: directories `version-<n>`, the newest few of them kept.

What is in one is the transport's business, which is chosen here.
"""

import shutil
from pathlib import Path

import torch

from megatron_a3po.config.rollout import RolloutSection
from megatron_a3po.weights.transports.base import Transport
from megatron_a3po.weights.transports.collective import CollectiveTransport
from megatron_a3po.weights.transports.files import FilesTransport

PREFIX = "version-"


def create_transport(rollout: RolloutSection, device: torch.device) -> Transport:
    """What `rollout.weight_transport` names."""
    match rollout.transport:
        case "files":
            return FilesTransport()
        case "collective":
            return CollectiveTransport(
                device,
                bucket_bytes=rollout.bucket_bytes,
                # Servers we launch are on this machine, and nobody else has business with the weights.
                loopback_only=rollout.launch is not None,
            )


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
