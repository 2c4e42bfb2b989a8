"""In which keys two configurations differ: whether a run directory may be continued is decided by this."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_a3po.config.config import Config
from megatron_a3po.errors import ConfigError


def differing_keys(file: Path, config: Config) -> list[str]:
    """The dotted keys whose value in `file`, a resolved configuration, is another than in `config`.

    `file` may be of an older version and is compared as it stands, keys that no longer exist included. run_dir does
    not count: a run directory may be moved.
    """
    try:
        old = flat(OmegaConf.to_container(OmegaConf.load(file), resolve=False))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} is not readable: {str(error).splitlines()[0]}.") from None
    new = flat(config.model_dump(mode="json"))
    keys = [key for key in dict.fromkeys([*new, *old]) if key != "run_dir"]
    return [key for key in keys if key not in old or key not in new or old[key] != new[key]]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that is no section."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.")
    return leaves
