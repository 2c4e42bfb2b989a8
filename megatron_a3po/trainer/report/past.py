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
from megatron_a3po.trainer.recording import METRICS, TRACE, read_findings, read_metrics
from megatron_a3po.trainer.report.curves import HISTOGRAM
from megatron_a3po.trainer.report.ending import is_running, last_error
from megatron_a3po.trainer.summary import SUMMARY, read_summary

SUMMARY_NUMBERS = ("wall_seconds", "accuracy_before", "accuracy_after", "multi_version_fraction")


@dataclass(frozen=True)
class Past:
    """Configuration, rows and summary of a run; the summary is None unless it has ended well."""

    directory: Path
    config: dict[str, Any]  # dotted key -> value
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    is_running: bool

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

    @property
    def is_over(self) -> bool:
        """Nothing more will be recorded, unless it is started again."""
        return self.summary is not None or not self.is_running

    @cached_property
    def error(self) -> str | None:
        """The last words of a run that neither goes on nor has ended well, if it had any."""
        return None if self.summary is not None or self.is_running else last_error(self.directory)

    @cached_property
    def findings(self) -> list[Finding]:
        """What the health rules say of it, and what they said where no row shows it."""
        found = findings(self.rows, self.config)
        causes = {finding.cause for finding in found}
        found += [finding for finding in read_findings(self.directory) if finding.cause not in causes]
        return sorted(found, key=lambda finding: finding.step)


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
    # In this order: a run that ends meanwhile is not taken for one that crashed.
    goes_on = is_running(directory)
    rows = [_numbers(row) for row in read_metrics(directory)]
    return Past(directory, config, rows, _summary(directory), goes_on)


def _summary(directory: Path) -> dict[str, Any] | None:
    """With null for what should be a number and is none."""
    summary = read_summary(directory)
    if summary is None:
        return None
    return summary | {name: number(summary, name) for name in SUMMARY_NUMBERS}


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for whatever is no finite number, and no histogram."""
    found: dict[str, Any] = {name: number(row, name) for name in row}
    return found | {"step": row["step"], HISTOGRAM: _histogram(row.get(HISTOGRAM))}


def _histogram(found: Any) -> dict[str, float] | None:
    """Age -> tokens; None where nothing can be a share of it."""
    if not isinstance(found, dict) or not all(age.isdecimal() for age in found):
        return None
    counts = {age: number(found, age) for age in found}
    sound = {age: count for age, count in counts.items() if count is not None and count >= 0}
    return sound if len(sound) == len(counts) and sum(sound.values()) > 0 else None
