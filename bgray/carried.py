"""Errors that a person can mend, through Ray Data: it passes on the text of an exception and loses
what it was."""

import base64
import json
import re
from collections.abc import Callable
from typing import TypeVar

from bgray.problems import ConfigError

T = TypeVar("T")
MARK = re.compile(r"<bgray ([A-Za-z0-9+/=]+)>")


def packed(work: Callable[[], T]) -> T:
    """What `work` returns; its ConfigError or OSError becomes one whose text `unpacked` reads."""
    try:
        return work()
    except ConfigError as error:
        facts: list = ["config", error.source, error.problems]
    except OSError as error:
        facts = ["os", error.errno, error.strerror or str(error), error.filename]
    text = base64.b64encode(json.dumps(facts, default=str).encode()).decode()
    raise RuntimeError(f"<bgray {text}>")


def unpacked(error: Exception) -> Exception:
    """The error that was packed, or this one where none was."""
    if (found := MARK.search(str(error))) is None:
        return error
    kind, *facts = json.loads(base64.b64decode(found[1]))
    if kind == "os":
        return OSError(*facts)
    source, problems = facts
    return ConfigError(source, [tuple(problem) for problem in problems])
