"""The names of all keys, and the one a mistyped key was probably meant to be."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from megatron_a3po.config.section import Section


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The section classes an annotation allows: one, the members of a union, or none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def dotted_keys(root: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of the tree, sections included: `actor`, `actor.lr`, ..."""
    for name, field in root.model_fields.items():
        yield prefix + name
        for section in sections_in(field.annotation):
            yield from dotted_keys(section, f"{prefix}{name}.")


def closest_key(unknown: str, root: type[Section]) -> str | None:
    """What `unknown` was probably meant to be: the same name in another section, then a near name in its own
    section, then a near name anywhere."""
    known = list(dict.fromkeys(dotted_keys(root)))
    section, _, name = unknown.rpartition(".")
    if same := [key for key in known if key.rpartition(".")[2] == name]:
        return same[0]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    if near := difflib.get_close_matches(unknown, siblings, n=1, cutoff=_cutoff(section, name)):
        return near[0]
    names = {key.rpartition(".")[2]: key for key in reversed(known)}
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
        return names[near[0]]
    return None


def _cutoff(section: str, name: str) -> float:
    """difflib's ratio over whole dotted keys at which the last names alone are about 0.6 alike."""
    shared, own = len(section), max(len(name), 1)
    return (shared + 0.6 * own) / (shared + own)
