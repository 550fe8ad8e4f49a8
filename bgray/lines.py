"""Files of lines of JSON, one a step: written small, read but for a last line that is torn."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from bgray import storage
from bgray.problems import ConfigError, first_line


def as_text(line: dict[str, Any]) -> str:
    """One line, numbers as `shortened`. What was read from a line gives that line again."""
    return json.dumps(shortened(line), separators=(",", ":")) + "\n"


def shortened(value: Any) -> Any:
    """Plain data with its floats to seven digits, which is all that float32 has: a file of lines
    stays small, and what is read from it is what was reported."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list) else value


def read_lines(url: str) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, one object each; a last line that a crash cut short is left
    out; none where there is no file.

    ConfigError for any other line that is damaged: no crash does that, for lines are appended.
    """
    try:
        lines = storage.read_bytes(url).removesuffix(b"\n").split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_checked(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            text = f"line {number} of {len(lines)} is damaged ({first_line(error)}); "
            text += "mend that line, or move its folder away to start afresh"
            raise ConfigError(url, [("", text)]) from None
    return found


def _checked(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise ValueError("no object")
    return line


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """A full disk does not say for which file it has no room: the OSError gets its name."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = path
        raise
