"""Whether `reward.path` or `rollout.workflow` leads to a function, found out without importing anything of the user's.

What its text does not tell (compiled modules, names made at run time) passes: the reward's own process then loads it.
"""

import ast
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def why_not_found(path: str) -> str | None:
    """What is wrong with `module:function` and the mend, if it cannot be loaded."""
    module, _, function = path.partition(":")
    top, *below = module.split(".")
    spec = _top_module(top)
    if spec is None:
        return "there is no such module: put its folder on PYTHONPATH"
    name = top
    for part in below:
        if spec.submodule_search_locations is None:
            return None  # a module that stands for a package may make its modules itself
        try:
            spec = PathFinder.find_spec(f"{name}.{part}", list(spec.submodule_search_locations))
        except (ImportError, KeyError, ValueError):
            return None  # a namespace inside a namespace is known only once imported
        if spec is None:
            return f"{name} has no module {part}: write the path as module:function"
        name = f"{name}.{part}"
    if not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    names = _names(Path(spec.origin))
    if names is None or function in names:
        return None
    return f"{spec.origin} has no {function}: name a function that is there"


def _top_module(name: str) -> ModuleSpec | None:
    """On the path, or in the current directory, which `python -m` puts there."""
    try:
        return importlib.util.find_spec(name) or PathFinder.find_spec(name, [str(Path.cwd())])
    except (ImportError, ValueError):
        return None


def _names(file: Path) -> set[str] | None:
    """The names that running the file gives its module; None where its text cannot tell."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None  # importing it has more to say
    if any(map(_makes_names, ast.walk(tree))):
        return None
    names: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                    continue  # what is inside is its own
                case ast.Lambda():
                    continue
                case ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.alias(name=name, asname=other):
                    names.add(other or name.split(".")[0])
                case _:
                    pass
            todo.append(node)
    return names


def _makes_names(node: ast.AST) -> bool:
    match node:
        case ast.Global() | ast.alias(name="*") | ast.FunctionDef(name="__getattr__"):
            return True
        case ast.Name(id=name):
            return name in ("globals", "vars", "exec", "setattr")
        case _:
            return False
