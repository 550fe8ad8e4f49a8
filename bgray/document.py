"""An experiment's YAML as plain data: read strictly, overridden by dotted path."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from bgray.problems import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is written twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(source: str) -> dict[str, Any]:
    """The file as plain data, sweep keys and all; its name is the default of `name`."""
    path = Path(source)
    if path.is_dir():
        raise ConfigError(source, [("", "is a folder; give the path of an experiment's YAML")])
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = (
            f"; did you mean {path.parent / near[0]}?"
            if near
            else "; give the path of an experiment's YAML"
        )
        raise ConfigError(source, [("", f"no such file{hint}")])
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(source, [("", f"not valid YAML: {error}")]) from None
    if raw is None:
        raise ConfigError(source, [("", "is empty; write at least `task:` and `model:`")])
    if not isinstance(raw, dict):
        raise ConfigError(
            source, [("", f"expected `key: value` lines at the top, got {type(raw).__name__}")]
        )
    raw.setdefault("name", path.stem)
    return raw


def override(raw: dict[str, Any], overrides: tuple[str, ...], source: str) -> None:
    """Apply `a.b=value` from the command line in place; values are YAML."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(source, [(f"--set {item}", "write it as --set path.to.key=value")])
        try:
            set_path(raw, key.strip(), yaml.safe_load(text))
        except (yaml.YAMLError, ConfigError) as error:
            text = error.problems[0][1] if isinstance(error, ConfigError) else str(error)
            raise ConfigError(source, [(f"--set {item}", text)]) from None


def set_path(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, in place, making the missing ones."""
    *parents, last = dotted.split(".")
    node = raw
    for i, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(
                dotted, [("", f"'{'.'.join(parents[: i + 1])}' holds a value, not keys")]
            )
    node[last] = value
