"""One HTML file of one or several runs: everything inside, nothing from a network.

The verdicts are written by the template, figures and samples by page.js from a JSON block. Text that comes from a run
is escaped by the template, or set as text by the script. Plots are uPlot's (MIT, its licence beside it).
"""

import os
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_a3po.trainer.report import plots, samples, verdict
from megatron_a3po.trainer.report.past import Past

PACKAGE = "megatron_a3po.trainer.report"


def page(pasts: Sequence[Past], *, reload_s: int | None = None) -> str:
    """The page's text. With `reload_s` a browser loads it again after so many seconds."""
    names = _names([past.directory for past in pasts])
    columns = [verdict.figures(past) for past in pasts]
    return _template().render(
        names=names,
        verdicts=[verdict.verdict(past) for past in pasts],
        findings=[past.findings for past in pasts],
        timelines=[past.timeline for past in pasts],
        figures={label: [column[label] for column in columns] for label in columns[0]},
        differences=verdict.differing_keys(list(pasts)),
        config=pasts[0].config if len(pasts) == 1 else {},
        data=_data(pasts, names),
        reload_s=reload_s,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        asset=_asset,
    )


def _data(pasts: Sequence[Past], names: list[str]) -> dict[str, Any]:
    """What page.js draws from."""
    shown = samples.samples([past.directory for past in pasts])
    return {"runs": names, "sections": plots.sections(pasts), "samples": shown}


def _names(directories: list[Path]) -> list[str]:
    """What tells the runs apart: their paths, without what all have in common."""
    resolved = [directory.resolve() for directory in directories]
    common = os.path.commonpath([path.parent for path in resolved])
    return [str(path.relative_to(common)) for path in resolved]


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader(PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` leaves no character that could end the script it stands in, and nothing beyond ASCII.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html")


def _asset(name: str) -> str:
    """A file beside this one."""
    return files(PACKAGE).joinpath(name).read_text(encoding="utf-8")
