"""Writes docs/metrics.md from the metric table; with --check only says whether it is up to date."""

import sys
from pathlib import Path

from megatron_a3po.algorithm.metric_table import as_markdown

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text() == as_markdown() else 1
    PAGE.write_text(as_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
