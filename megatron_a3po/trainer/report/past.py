"""What a run directory holds of its run, finished or not. What is said of it is in `verdict`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_a3po.config.difference import flat
from megatron_a3po.errors import InputError
from megatron_a3po.trainer.health import Finding, findings, number
from megatron_a3po.trainer.recording import METRICS, TRACE, read_metrics
from megatron_a3po.trainer.summary import SUMMARY, read_summary


@dataclass(frozen=True)
class Past:
    """Configuration, rows and summary of a run; the summary is None until it has ended well."""

    directory: Path
    config: dict[str, Any]  # dotted key -> value
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Version of the weights -> held-out accuracy, as far as it is known."""
        found = {
            row["evaluation/version"]: row["evaluation/accuracy"]
            for row in self.rows
            if row.get("evaluation/accuracy") is not None and row.get("evaluation/version") is not None
        }
        if self.summary is not None:
            ends = {0: "accuracy_before", self.summary["steps"]: "accuracy_after"}
            found |= {v: self.summary[name] for v, name in ends.items() if self.summary.get(name) is not None}
        return {int(version): found[version] for version in sorted(found)}

    @property
    def timeline(self) -> Path | None:
        """Where its timeline is, if it has one (`trainer.trace`)."""
        file = self.directory / TRACE
        return file.resolve() if file.is_file() else None

    @cached_property
    def findings(self) -> list[Finding]:
        """What the health rules say of it."""
        return findings(self.rows, self.config)


def is_run(directory: Path) -> bool:
    """A run that died early has a configuration and logs; a folder with only a configuration is none."""
    recorded = any((directory / name).is_file() for name in (METRICS, SUMMARY))
    return recorded or ((directory / "config.yaml").is_file() and (directory / "logs").is_dir())


def read_past(directory: Path) -> Past:
    """Errors: InputError names a file that is damaged."""
    file = directory / "config.yaml"
    try:
        config = flat(OmegaConf.to_container(OmegaConf.load(file), resolve=False)) if file.is_file() else {}
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file} is not readable: {str(error).splitlines()[0]}.") from None
    return Past(
        directory, config, [_numbers(row) for row in read_metrics(directory)], read_summary(directory)
    )


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for whatever is no finite number and no histogram."""
    return {name: value if isinstance(value, dict) else number(row, name) for name, value in row.items()} | {
        "step": row["step"]
    }
