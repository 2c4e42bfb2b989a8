"""Read a configuration: a YAML file, `key=value` overrides, then every check there is.

OmegaConf reads and merges (PyYAML would read `1e-6` as text), `validate.py` types the result, `checks.py` and
`file_checks.py` look at how the values go together and at the files they name. All problems come at once.
Nothing here imports torch: a mistake costs a fraction of a second.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_a3po.config.checks import config_problems
from megatron_a3po.config.config import Config
from megatron_a3po.config.difference import flat
from megatron_a3po.config.file_checks import file_problems
from megatron_a3po.config.problem import Problem, shown
from megatron_a3po.config.validate import validate
from megatron_a3po.errors import ConfigError


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    check_files: bool = True,
    world_size: int | None = None,
) -> Config:
    """The configuration in `path` (a YAML file, or a folder with a config.yaml such as a run directory).

    `overrides` are dotted `key=value` texts. `world_size` is the number of ranks a launcher has started, None
    without one. Raises ConfigError with every problem found.
    """
    file = Path(path) / "config.yaml" if Path(path).is_dir() else Path(path)
    raw, problems = _merged(_read(file), overrides)
    raw.setdefault("run_dir", f"runs/{default_name(file)}")
    config, mistakes = validate(raw)
    problems += mistakes
    if config is not None:
        problems += _interpolations(config)
        more = list(config_problems(config, world_size))
        if check_files:
            more += file_problems(config)
        broken = {key for problem in problems for key in problem.keys}
        problems += [problem for problem in more if not _touches(problem, broken)]
    if problems or config is None:
        raise ConfigError(dict.fromkeys(problem.sentence for problem in problems))
    return config


def default_name(file: Path) -> str:
    """What a configuration is called: its file, or its folder where the file is just config.yaml."""
    return file.resolve().parent.name if file.stem == "config" else file.stem


def to_yaml(config: Config) -> str:
    """The resolved configuration, every key; load_config reads it back as the same."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _read(file: Path) -> Any:
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{file} is not there: give the path of a configuration file.") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where} is not readable as YAML: {reason}.") from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} is not readable: {str(error).splitlines()[0]}.") from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(
            f"{file} holds a list, but must be a mapping of sections such as model, data and trainer."
        )
    return loaded


def _merged(loaded: Any, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The file with the overrides merged in, and what is wrong with the overrides themselves."""
    problems: list[Problem] = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            sentence = f"{shown(override)} is not an override: write it as section.key=value."
            problems.append(Problem((), sentence))
            continue
        try:
            loaded = OmegaConf.merge(loaded, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem((key,), f"the override {shown(override)} is not readable: {reason}."))
    plain = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, problems


def _interpolations(config: Config) -> list[Problem]:
    """`${...}` is OmegaConf's wiring; here every key says its value itself."""
    return [
        Problem((key,), f"{key} is {shown(value)}, but ${{...}} is not filled in: write the value itself.")
        for key, value in flat(config.model_dump(mode="json")).items()
        if isinstance(value, str) and "${" in value
    ]


def _touches(problem: Problem, broken: set[str]) -> bool:
    return any(
        key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")
        for key in problem.keys
        for other in broken
    )
