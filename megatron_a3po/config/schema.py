"""The JSON Schema of the configuration, for editors that complete YAML: `python -m megatron_a3po.config.schema`.

`schema.json` beside this file is generated and committed; a test holds the two equal.
"""

import json
from pathlib import Path
from typing import Any

from megatron_a3po.config.config import Config

SCHEMA_FILE = Path(__file__).with_name("schema.json")


def build_schema() -> dict[str, Any]:
    """The schema of a configuration file; run_dir may be left out of one, it comes from the file's name."""
    schema = Config.model_json_schema()
    schema["required"].remove("run_dir")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(build_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
