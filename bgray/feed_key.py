"""What determines the bytes of a work unit, as one key: recipe, rank, the code that makes it."""

import ast
import dataclasses
import functools
import importlib.metadata
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bgray.config import digest
from bgray.data import Recipe, make_unit

PACKAGE = Path(__file__).parent
LIBRARIES = ("numpy", "scipy", "soundfile", "soxr", "python-stretch", "pyarrow")
"""That decode, resample, filter and shift; which torch there is makes no difference to a unit."""


class Unsure(Exception):
    """It cannot be said which code makes the units of this process."""


def key_of(recipe: Recipe, rank: int = 0, world: int = 1) -> str:
    """32 hex digits: equal keys are equal units, whatever the path of the data. Unsure where the
    source has changed since this process read it."""
    options = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.name not in ("url", "task", "augment")
    }
    assert recipe.data_hash, "a recipe without its data's hash has no key"
    makers = [recipe.task, *recipe.augment]
    modules = {make_unit.__module__, *(type(maker).__module__ for maker in makers)}
    return digest(
        {
            "recipe": options,
            "makers": [[type(m).__module__, type(m).__qualname__, _plain(vars(m))] for m in makers],
            "rank": [rank, world],
            "code": fingerprint(frozenset(modules)),
        }
    )[:32]


def _plain(value: Any) -> Any:
    """Options as JSON has them; TypeError for an object that would be told by its address."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} is no plain option")


@functools.lru_cache
def fingerprint(modules: frozenset[str]) -> str:
    """Of these modules' sources and all of bgray's that they import, and of what else decides what
    they compute."""
    return digest(
        {
            "sources": {name: _unchanged(name) for name in sorted(_with_imports(modules))},
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Read now, while they are what this process runs: an edit made later is not what it runs.
_FILES = {_module(path): path for path in PACKAGE.rglob("*.py")}
_SOURCES = {name: _read(path) for name, path in _FILES.items()}


def _unchanged(name: str) -> str:
    if name in _FILES:
        path, source = _FILES[name], _SOURCES[name]
    else:  # a task or an augmentation of somebody else's
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        source = _SOURCES.setdefault(name, _read(path))
    if not source and name not in _FILES:
        raise Unsure(f"there is no source of {name}")
    if _read(path) != source:
        raise Unsure(f"{path} has changed since this process began")
    return source


def _with_imports(modules: Iterable[str]) -> set[str]:
    """And what they import of bgray, directly or not, in functions too."""
    found, todo = set(), list(modules)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += _imports(_unchanged(name))
    return found


@functools.lru_cache(maxsize=256)
def _imports(source: str) -> tuple[str, ...]:
    """bgray's modules that a source names in its imports."""
    named = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    parents = [dotted.rsplit(".", i)[0] for dotted in named for i in range(2)]
    return tuple(dotted for dotted in parents if dotted in _FILES)
