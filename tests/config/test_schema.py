"""The committed JSON Schema is the one the code makes, and every key in it is documented."""

import pytest

from megatron_a3po.config.config import Config
from megatron_a3po.config.keys import sections_in
from megatron_a3po.config.schema import SCHEMA_FILE, build_schema, schema_text
from megatron_a3po.config.section import Section


def all_sections(root: type[Section] = Config) -> list[type[Section]]:
    inner = [s for field in root.model_fields.values() for s in sections_in(field.annotation)]
    return [root, *(section for child in inner for section in all_sections(child))]


def test_the_committed_schema_is_current():
    assert SCHEMA_FILE.read_text() == schema_text(), "run python -m megatron_a3po.config.schema"


def test_a_file_may_leave_the_run_directory_out():
    assert set(build_schema()["required"]) == {"model", "data", "trainer"}


@pytest.mark.parametrize("section", all_sections(), ids=lambda section: section.__name__)
def test_every_key_is_documented(section: type[Section]):
    assert section.__doc__
    for name, field in section.model_fields.items():
        is_section = any(True for _ in sections_in(field.annotation))
        assert field.description or is_section or name == "type", name
