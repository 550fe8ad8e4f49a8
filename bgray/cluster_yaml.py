"""A cluster's YAML as plain data that knows on which line each key stands, and what is wrong
there."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Where = tuple[str | int, ...]
"""Keys and list positions from the top of the file."""


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    line: int
    """From 1; of the nearest key above, where something is missing."""
    path: str
    text: str
    error: bool = True
    """False: worth knowing, and nothing that stops a start."""

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        return f"line {self.line}: {'' if self.error else 'warning: '}{path}{self.text}"


class Sheet:
    """One cluster file while it is checked."""

    def __init__(self, source: str):
        """Reads `source`; what is not YAML, or not a mapping, is in `problems` and `data` is {}.

        Raises OSError when it cannot be read.
        """
        self.source = Path(source)
        self.text = self.source.read_text(errors="replace")
        self.lines = self.text.splitlines()
        self.problems: set[Problem] = set()
        self.data: dict[str, Any] = {}
        self._at: dict[Where, int] = {(): 1}
        try:
            node = yaml.compose(self.text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            what = getattr(error, "problem", None) or str(error)
            self._add(mark.line + 1 if mark else 1, (), f"not valid YAML: {what}", True)
            return
        except RecursionError:
            self._add(1, (), "not valid YAML: nested too deeply", True)
            return
        if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
            self._add(1, (), "expected `key: value` lines at the top", True)
            return
        self._locate(node, (), ())
        if not any("refers to itself" in p.text for p in self.problems):
            self.data = data

    def _locate(self, node: yaml.Node, where: Where, above: tuple[int, ...]) -> None:
        if id(node) in above:
            self._add(node.start_mark.line + 1, where, "an anchor that refers to itself", True)
            return
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._at.setdefault((*where, i), item.start_mark.line + 1)
                self._locate(item, (*where, i), above)
        if not isinstance(node, yaml.MappingNode):
            return
        written: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if isinstance(value, yaml.ScalarNode):  # an alias: to be mended where it is written
                line = value.start_mark.line + 1
            if name in written:
                text = "is written twice: the second silently replaces the first"
                self._add(key.start_mark.line + 1, (*where, name), text, True)
            written.add(name)
            self._at.setdefault((*where, name), line)
            self._locate(value, (*where, name), above)
        for key, value in node.value:  # after its own keys, for those win
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._locate_merged(merged, where, above)

    def _locate_merged(self, node: yaml.Node, where: Where, above: tuple[int, ...]) -> None:
        own, self._at = self._at, {}
        self._locate(node, where, above)
        found, self._at = self._at, own
        replaced = {at for at in own if len(at) == len(where) + 1 and at[: len(where)] == where}
        for at, line in found.items():
            if at[: len(where) + 1] not in replaced:
                self._at.setdefault(at, line)

    def found(self) -> list[Problem]:
        """All problems in the order of their lines; one for what several places take from an
        anchor."""
        alike: dict[tuple[int, str, bool], list[str]] = {}
        for p in sorted(self.problems):
            alike.setdefault((p.line, p.text, p.error), []).append(p.path)
        return sorted(
            Problem(line, paths[0], text + _elsewhere(len(paths) - 1), error)
            for (line, text, error), paths in alike.items()
        )

    def line(self, where: Where) -> int:
        """Where that key stands, or the nearest one above it."""
        while where not in self._at:
            where = where[:-1]
        return self._at[where]

    def _add(self, line: int, where: Where, text: str, error: bool) -> None:
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where).lstrip(".")
        self.problems.add(Problem(line, path, text, error))

    def error(self, where: Where, text: str, line: int | None = None) -> None:
        self._add(line or self.line(where), where, text, True)

    def warn(self, where: Where, text: str, line: int | None = None) -> None:
        self._add(line or self.line(where), where, text, False)

    def get(self, *where: str | int) -> Any:
        """The value there, or None."""
        value: Any = self.data
        for part in where:
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def table(self, *where: str | int) -> dict[str, Any]:
        """The mapping there; {} when there is none (Ray's schema says so then)."""
        value = self.get(*where)
        return value if isinstance(value, dict) else {}

    def leaves(self) -> Iterator[tuple[Where, Any]]:
        """Every value that is neither a mapping nor a list, with its place."""

        def walk(value: Any, where: Where) -> Iterator[tuple[Where, Any]]:
            if isinstance(value, dict):
                for key, item in value.items():
                    yield from walk(item, (*where, str(key)))
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from walk(item, (*where, i))
            else:
                yield where, value

        yield from walk(self.data, ())


def _elsewhere(count: int) -> str:
    return f" (as in {count} more place{'s' * (count > 1)})" if count else ""


# --- what must stand in no file

SECRETS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "an access token": r"\b(?:gh[pousr]_|github_pat_|hf_|xox[abp]-|sk-)[A-Za-z0-9_-]{16,}",
    "a password in an address": r"://[^\s/:@$]+:[^\s/@$]+@",
}
NAMED = r"(?!ssh_|[\w-]*public)(?:[\w-]+[_-]key|[\w-]*(?:token|secret|password))"
"""`Key:` alone is a tag or a toleration, and what is named like ssh_private_key is a file."""
LITERAL = r"(?![~/.$<{*&|>])[^\s\"'$,;}\])/]{8,}"
"""A value that is no path, variable, reference or command."""
SECRETS_BUT_FOR_PATHS = {
    "a secret": r"(?i)\b[\w-]*(?:password|passwd|secret_?access_?key|secret_?key|api_?key|"
    r"auth_?token|access_?token|session_?token)[\"']?\s*[=:]\s*[\"']?(?![~/.$<{*&|>])[^\s\"'$,}]{6,}",
    # With a colon, the value must be all there is: `token: what follows` may be a sentence.
    "a secret by its name": rf"(?i)(?<![\w-]){NAMED}[\"']?(?:=[\"']?{LITERAL}"
    rf"|:\s+[\"']?{LITERAL}(?=[\"',;}}\])]|\s*$|\s+#))",
    "what looks like a secret in hexadecimal": r"(?<![\w-])[0-9a-fA-F]{32,}(?![\w-])",
    "what looks like a secret in base64": r"(?<![\w+/])(?=[\w+/]*[A-Z])(?=[\w+/]*[a-z])"
    r"(?=[\w+/]*[0-9])[A-Za-z0-9+/]{40,}={0,2}(?![\w+/])",
}
PATHS = re.compile(r"\w+://[^\s\"',?]*|sha256:[0-9a-f]{64}\b|(?<![\w+/-])[~.]{0,2}/[^\s\"',;]*")
"""Addresses, an image's digest, paths: as long and as random as they like."""


def refuse_secrets(sheet: Sheet) -> None:
    """Comments too: a file goes into a repository whole, and `ray up` copies it to the head."""
    for number, line in enumerate(sheet.lines, 1):
        bare = PATHS.sub("", line)
        what = next((w for w, p in SECRETS.items() if re.search(p, line)), None)
        what = what or next((w for w, p in SECRETS_BUT_FOR_PATHS.items() if re.search(p, bare)), "")
        if what:
            sheet.error((), f"{what} on this line; {INSTEAD}", line=number)
    for where, value in sheet.leaves():  # a container's environment: {name: WANDB_KEY, value: ...}
        name = str(sheet.get(*where[:-1], "name")) if where[-1:] == ("value",) else ""
        if re.fullmatch(NAMED, name, re.IGNORECASE) and re.fullmatch(LITERAL, str(value)):
            sheet.error(where, f"a secret by its name; {INSTEAD}")


INSTEAD = (
    "machines get rights from their role (IamInstanceProfile, service account) and the token from "
    "~/.ray/auth_token. One that stood in a file counts as lost: make another"
)
