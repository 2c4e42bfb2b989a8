"""From a plain mapping to a typed Config, with every mistake as a sentence.

Values are validated as JSON, strictly: text is not a number, `yes` is not a rate. What is wrong is then
mended with defaults and validated again, so that one mistake does not hide the others; the mended Config is only
there to look for more problems and is never run. Next: `checks.py`, which looks at how the values go together.
"""

import json
from typing import Any

from pydantic import ValidationError

from megatron_a3po.config.config import Config
from megatron_a3po.config.keys import closest_key
from megatron_a3po.config.problem import Problem, shown

# Values somebody may well write, and that need more than the list of what is allowed.
HINTS = {
    ("actor.prox_logp_method", "rollout"): (
        "anchoring the clip at the behaviour policy is what the coupled loss does: set "
        "actor.use_decoupled_loss=false and leave actor.prox_logp_method out"
    ),
}

NUMBERS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
}


def validate(raw: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The Config and what is wrong with it; the Config is None where it could not even be mended."""
    problems: list[Problem] = []
    told: set[str] = set()
    # Each round mends one level: a missing section, then the missing keys inside it.
    for _ in range(4):
        try:
            return Config.model_validate_json(json.dumps(raw, default=str)), problems
        except ValidationError as error:
            found = error.errors(include_url=False)
        raw = json.loads(json.dumps(raw, default=str))
        for item in found:
            path = _path(item["loc"], raw)
            if item["type"] == "missing" and path in (["model"], ["data"], ["trainer"]):
                _put(raw, path, {})  # the next round names the keys that have to be in it
                continue
            if not {".".join(path[:length]) for length in range(1, len(path) + 1)} & told:
                problems.append(_problem(path, item))
        told |= {problem.keys[0] for problem in problems}
        for item in found:
            _mend(raw, _path(item["loc"], raw), item)
    return None, problems


def _path(location: tuple[int | str, ...], raw: dict[str, Any]) -> list[str]:
    """The keys of an error's location; pydantic puts the tag of a union between them."""
    path: list[str] = []
    here: Any = raw
    for part in location:
        if isinstance(here, dict) and part not in here and part == here.get("type"):
            continue
        path.append(str(part))
        here = here.get(part) if isinstance(here, dict) else None
    return path


def _problem(path: list[str], item: Any) -> Problem:
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        meant = closest_key(key, Config)
        mend = (
            f"did you mean {meant}?"
            if meant
            else "remove it; every key is in megatron_a3po/config/schema.json."
        )
        return Problem((key, meant) if meant else (key,), f"{key} is not a key: {mend}")
    if item["type"] == "missing":
        return Problem((key,), f"{key} is missing and has no default: write it in the file or give {key}=...")
    if item["type"] == "union_tag_not_found" and isinstance(item["input"], dict):
        tags = item["ctx"].get("expected_tags") or "exact_number, math, function"
        return Problem((key,), f"{key}.type is missing: it must be one of {tags}.")
    if item["type"] == "union_tag_invalid":
        tag, tags = item["ctx"]["tag"], item["ctx"]["expected_tags"]
        return Problem((key,), f"{key}.type is {shown(tag)}, but must be one of {tags}.")
    value = item["input"]
    if hint := HINTS.get((key, value if isinstance(value, str) else "")):
        return Problem((key,), f"{key} is {shown(value)}, which is refused: {hint}.")
    sentence = f"{key} is {shown(value)}, but must be {wanted(item)}"
    if isinstance(value, bool):
        sentence += " (YAML reads yes, no, on and off as true and false)"
    return Problem((key,), f"{sentence}.")


def wanted(item: Any) -> str:
    """What an error of pydantic says that the value should have been."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in NUMBERS:
        return NUMBERS[kind]
    match kind:
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text (in quotes if it looks like a number)"
        case "string_too_short":
            return "text that is not empty"
        case "string_pattern_mismatch":
            return f"text of the form {context['pattern']}"
        case "literal_error" | "enum":
            return f"one of {context['expected']}"
        case "greater_than":
            return f"greater than {context['gt']:g}"
        case "greater_than_equal":
            return f"at least {context['ge']:g}"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "less_than_equal":
            return f"at most {context['le']:g}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "a section with keys of its own"
        case "list_type":
            return "a list"
        case _:
            return item["msg"][0].lower() + item["msg"][1:]


def _mend(raw: dict[str, Any], path: list[str], item: Any) -> None:
    """Make the value readable: absent where there is a default, else something of the right type."""
    if path[0] == "reward":
        raw.pop("reward", None)  # a half-mended union is more trouble than none
    elif item["type"] == "missing":
        if not isinstance(_get(raw, path), dict):
            _put(raw, path, 1 if path[-1] == "steps" else "?")
    else:
        parent = _get(raw, path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)


def _get(raw: Any, path: list[str]) -> Any:
    for part in path:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _put(raw: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        raw = raw[part]
    raw[path[-1]] = value
