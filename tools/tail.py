"""Print where the code is long: the ten longest files and functions, and the lines of each folder.

Median sizes are alike everywhere; it is the tail that makes a code base hard to read. Nothing here fails: a file
past 400 lines or a function past 60 is a question to answer.
"""

import ast
import subprocess
from collections import Counter
from pathlib import Path

SHOWN = 10
QUESTION_FILE_LINES = 400
QUESTION_FUNCTION_LINES = 60


def tracked_sources() -> list[Path]:
    """The Python files git knows, new ones that it does not ignore included."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for path in map(Path, listing.stdout.split()) if path.exists()]


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, where) of every function of a file."""
    tree = ast.parse(path.read_text(), filename=str(path))
    return [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def folder_of(path: Path) -> str:
    """The folder a file is counted in: two levels deep inside the package, one elsewhere."""
    depth = 2 if path.parts[0] == "megatron_a3po" else 1
    return "/".join(path.parts[:-1][:depth]) or "."


def print_longest(title: str, rows: list[tuple[int, str]], question: int) -> None:
    """One table of the longest, those past the question mark marked."""
    print(f"\nlongest {title} (past {question}: ?)")
    for lines, where in sorted(rows, reverse=True)[:SHOWN]:
        print(f"{lines:6d} {'?' if lines > question else ' '} {where}")


def main() -> None:
    sources = tracked_sources()
    lengths = {path: len(path.read_text().splitlines()) for path in sources}
    print_longest("files", [(lines, str(path)) for path, lines in lengths.items()], QUESTION_FILE_LINES)
    print_longest("functions", [row for path in sources for row in functions(path)], QUESTION_FUNCTION_LINES)

    folders: Counter[str] = Counter()
    for path, lines in lengths.items():
        folders[folder_of(path)] += lines
    print("\nlines by folder")
    for folder, lines in sorted(folders.items()):
        print(f"{lines:6d}   {folder}")
    print(f"{sum(folders.values()):6d}   total")


if __name__ == "__main__":
    main()
