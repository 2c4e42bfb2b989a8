"""Everything that needs a GPU, on one GPU, with what is installed here; `make gpu-check` runs it, in under ten minutes.

Each part runs in a process of its own, so that one failure (even one that leaves the device unusable) hides no other.
What cannot run here is said loudly, with the reason. The report, figures included, is written as Markdown and JSON.
Exit code 1 if a part failed. Without a GPU nothing runs, one sentence says so, and the exit code is 0. The parts
themselves are in `gpu_parts.py`.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, find_device

from megatron_a3po.environment import child_environment

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 570.0
SIGNS = {"passed": "ok", "failed": "!!! FAILED", "left out": "!!! LEFT OUT"}
Result = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    device, why_not = find_device()
    if device is None:
        print(f"gpu-check left out: {why_not}.")
        return 0
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET_S
    results = []
    for name in arguments.parts or PARTS:
        print(f"--- {name}", flush=True)
        results.append(run_part(name, folder, deadline - time.monotonic()))
        print(f"{SIGNS[results[-1]['status']]}: {name} {'; '.join(results[-1]['notes'])}", flush=True)
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(report(device, results))
    print(f"report: {folder / 'report.md'} and report.json")
    return 1 if any(result["status"] == "failed" for result in results) else 0


def run_part(name: str, folder: Path, seconds: float) -> Result:
    """The part's own result, or why there is none."""
    answer, log, start = folder / f"{name}.json", folder / f"{name}.log", time.monotonic()
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tools/gpu_parts.py"), name, "--json", str(answer.resolve())]
    result: Result = {"part": name, "status": "failed", "rows": []}
    if seconds <= 0:
        return result | {"notes": [f"no time left of the {BUDGET_S:.0f} s of all parts"], "seconds": 0.0}
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=child_environment(PYTHONPATH=str(ROOT)),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=min(seconds, PARTS[name].limit_s),
                check=False,
            )
            notes = [f"the process ended with {done.returncode}; why is at the end of {log}"]
        except subprocess.TimeoutExpired as late:
            notes = [f"not done after {late.timeout:.0f} s; where it was is at the end of {log}"]
    result["notes"] = notes
    if answer.is_file():
        result |= json.loads(answer.read_text())
    return result | {"seconds": round(time.monotonic() - start, 1)}


def report(device: str, results: list[Result]) -> str:
    """The figures of all parts, what failed and what was left out first."""
    lines = [f"# GPU check, {datetime.date.today()}", "", f"{device}. `make gpu-check`", ""]
    lines += ["| part | outcome | seconds | notes |", "|---|---|---|---|"]
    for result in sorted(results, key=lambda result: list(SIGNS).index(result["status"]), reverse=True):
        notes = "; ".join(result["notes"]).replace("\n", " ").replace("|", "/")
        lines.append(f"| {result['part']} | {SIGNS[result['status']]} | {result['seconds']} | {notes} |")
    for result in results:
        if result["rows"]:
            lines += ["", f"## {PARTS[result['part']].title}", "", *_table(result["rows"])]
    return "\n".join(lines) + "\n"


def _table(rows: list[Result]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Everything that needs a GPU, on one GPU; one report of figures."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these, of: {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu-check", help="folder of the report")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
