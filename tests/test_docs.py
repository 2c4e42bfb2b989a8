"""The documentation does not rot: commands exist, links lead somewhere, tables agree with the code."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("*.md", "docs/**/*.md", "examples/**/*.md", "slurm/*.md")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(folder))


def name_of(requirement: str) -> str:
    """The package of a requirement: `megatron-core>=0.16.1,<0.20` -> megatron-core."""
    found = re.match(r"[A-Za-z0-9-]+", requirement)
    assert found, requirement
    return found.group()


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE) + re.findall(r"`make ([a-z-]+)", text)
    assert set(commands) <= targets

    named = re.findall(r"(?<![\w/.])((?:tools|tests|examples|slurm|megatron_a3po)/[\w/.-]+\.\w+)", text)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_call_of_the_loss_layer_runs_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/loss_layer.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "docs/loss_layer.md", "exec"), {})
    assert re.match(
        r"ratio \d+\.\d{3}, at most \d+\.\d{3}; clipped at staleness 2: [01]\.0", capsys.readouterr().out
    )


def test_readme_shows_the_commands_people_need() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in (
        "make quickstart",
        "make test",
        "python -m megatron_a3po train",
        "python -m megatron_a3po doctor",
    ):
        assert f"    {command}" in readme


def test_dependency_table_is_that_of_the_package(project: dict) -> None:
    tables = (ROOT / "docs/dependencies.md").read_text().split("Optional, by extra:")
    required = re.findall(r"^\| ([a-z0-9-]+) \|", tables[0], re.MULTILINE)
    assert required[1:] == [name_of(requirement) for requirement in project["project"]["dependencies"]]

    optional = {
        (extra, package)
        for extra, packages in re.findall(r"^\| ([a-z-]+) \| ([a-z0-9, -]+) \|", tables[1], re.MULTILINE)[1:]
        for package in packages.split(", ")
    }
    extras = project["project"]["optional-dependencies"]
    assert optional == {
        (extra, name_of(package)) for extra, packages in extras.items() for package in packages
    }


def test_newest_megatron_core_of_the_makefile_is_supported(project: dict) -> None:
    from packaging.requirements import Requirement

    newest = re.search(
        r"^MEGATRON_NEWEST = megatron-core==(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    supported = Requirement(project["project"]["dependencies"][0])
    assert newest
    assert supported.name == "megatron-core"
    assert newest.group(1) in supported.specifier
