"""What every section of the configuration is: frozen, strict, closed to unknown keys.

The docstring under a field is its documentation, in the JSON Schema too. Next: `config.py`, the whole tree.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the configuration."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
