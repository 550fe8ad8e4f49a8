"""What is wrong with a config, in words: path, value, remedy, all of them in one error."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pydantic

STRICT = pydantic.ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

Problem = tuple[str, str]
"""(path in the file, what is wrong and the way out)."""


class ConfigError(ValueError):
    """What a person wrote does not work; lists every problem as (path, what is wrong and the way
    out)."""

    def __init__(self, source: str, problems: Iterable[Problem]):
        self.source, self.problems = source, list(problems)
        lines = [f"  {path}: {text}" if path else f"  {text}" for path, text in self.problems]
        super().__init__("\n".join([f"{source}:", *lines]))

    def __reduce__(
        self,
    ):  # an exception is rebuilt from args by default, which here is the finished text
        return ConfigError, (self.source, self.problems)


def first_line(error: BaseException) -> str:
    """What an error says, without the rest; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def validate(
    schema: Any, raw: Any, path: str, also: Iterable[str] = ()
) -> tuple[Any, list[Problem]]:
    """(the checked object or None, problems) of plain data against a pydantic schema.

    path: of `raw` within the file. also: keys that are known at the top, to suggest them too.
    """
    # Through JSON, because strict JSON takes a list for a tuple and an int for a float, but never
    # text for a number.
    try:
        text = json.dumps(raw, default=str)
    except (ValueError, RecursionError):  # an anchor that holds itself
        return None, [(path, "refers to itself")]
    try:
        return pydantic.TypeAdapter(schema).validate_json(text, strict=True), []
    except pydantic.ValidationError as error:
        problems = [p for e in error.errors() for p in _explain(e, schema, path, also)]
        return None, list(dict.fromkeys(problems))


def _explain(error: Any, schema: Any, prefix: str, also: Iterable[str]) -> Iterator[Problem]:
    location = [part for part in error["loc"] if not _is_union_branch(part)]
    path = ".".join([prefix, *map(str, location)] if prefix else map(str, location))
    path = re.sub(r"\.(\d+)", r"[\1]", path)
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [*_siblings(schema, location), *(also if len(location) == 1 else ())]
        yield path, unknown(str(location[-1]), known, what="key")
    elif kind in ("missing", "missing_argument"):
        yield path, "missing, and it has no default"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bound = next((f"{sign[k]} {v:g}" for k, v in context.items() if k in sign), "")
        yield path, f"must be {bound}, got {value!r}"
    elif kind == "string_pattern_mismatch":
        yield path, f"letters, digits, '_', '-', '.', '+' and spaces only, got {value!r}"
    elif kind == "literal_error":
        yield path, f"expected one of {context['expected']}, got {value!r}"
    elif kind.endswith(("_type", "_parsing", "from_float")):
        yield path, wrong(kind.removesuffix("_from_float").split("_")[0], value)
    else:
        yield path, f"{error['msg']}, got {value!r}"


def wrong(expected: str, value: Any) -> str:
    """`expected float, got '1e-4'`, with the remedy where YAML has read a number as text."""
    words = {
        "tuple": "list",
        "bool": "true or false",
        "string": "text",
        "dataclass": "keys below it",
    }
    text = f"expected {words.get(expected, expected)}, got {value!r}"
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        mantissa, exponent = re.split("[eE]", value.strip())
        sign = "" if exponent.startswith(("+", "-")) else "+"
        fixed = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}"
        text += f" (write {fixed}: YAML reads {value} as text)"
    return text


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and bool(
        re.search(r"[\[\]()]|^(int|float|str|bool|none|function-.*)$", part)
    )


def _siblings(schema: Any, location: list[Any]) -> list[str]:
    node = schema
    for part in location[:-1]:
        annotations = getattr(node, "__dataclass_fields__", {})
        node = annotations[part].type if part in annotations else None
    if node is not None and hasattr(node, "model_fields"):
        return list(node.model_fields)
    return list(getattr(node, "__dataclass_fields__", {}))


def names(table: Iterable[str]) -> str:
    """What there is, as a sentence ends."""
    return ", ".join(table)


def unknown(name: str, known: Iterable[str], what: str = "name") -> str:
    """That a name is not known, with the nearest known one or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
    if near:
        return f"unknown {what}, did you mean '{near[0]}'?"
    return f"unknown {what} '{name}'" + (f"; there is {', '.join(known)}" if known else "")


def refuse(problems: Iterable[Problem], where: str = "") -> None:
    """ValueError with all `problems` of some options, if there are any."""
    found = list(problems)
    if found:
        indent, head = ("  ", [f"{where}:"]) if where else ("", [])
        raise ValueError("\n".join([*head, *(f"{indent}{name}: {text}" for name, text in found)]))
