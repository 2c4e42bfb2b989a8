"""A JSON file that somebody else wrote, read as the one object it should hold."""

import json
from pathlib import Path
from typing import Any

from megatron_a3po.errors import InputError


def read_json_object(file: Path, mend: str) -> dict[str, Any]:
    """Errors: InputError that ends with `mend` if the file cannot be read or holds anything but an object."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file} is missing: {mend}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable as JSON ({error}): {mend}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object: {mend}.")
    return values
