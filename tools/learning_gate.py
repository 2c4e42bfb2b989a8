"""Fail unless a finished run learned: `learning_gate.py RUN_DIR`, reading its summary.json.

The gate that CI holds the quickstart to; the figures a person should expect are in examples/quickstart/README.md.
"""

import argparse
import json
import sys
from pathlib import Path


def complaints(summary: dict[str, float], limits: argparse.Namespace) -> list[str]:
    """One sentence for each limit the run missed."""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    mixed = summary["multi_version_fraction"]
    checks = [
        (before < limits.before, f"accuracy before is {before:.3f}, should be below {limits.before}"),
        (after >= limits.after, f"accuracy after is {after:.3f}, should be at least {limits.after}"),
        (
            after - before >= limits.gain,
            f"the gain is {after - before:.3f}, should be at least {limits.gain}",
        ),
        (mixed >= limits.mixed, f"multi_version_fraction is {mixed:.3f}, should be at least {limits.mixed}"),
    ]
    return [sentence for holds, sentence in checks if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fail unless a finished run learned.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--before", type=float, default=0.6, help="accuracy before must be below this")
    parser.add_argument("--after", type=float, default=0.75, help="accuracy after must be at least this")
    parser.add_argument(
        "--gain", type=float, default=0.25, help="accuracy after minus before must be at least this"
    )
    parser.add_argument(
        "--mixed", type=float, default=0.05, help="least share of responses of several versions"
    )
    arguments = parser.parse_args()

    summary = json.loads((arguments.run_dir / "summary.json").read_text())
    wrong = complaints(summary, arguments)
    for sentence in wrong:
        print(f"learning gate: {sentence}", file=sys.stderr)
    if not wrong:
        print(
            f"learning gate passed: accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}, "
            f"{100 * summary['multi_version_fraction']:.0f}% of responses of several versions"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
