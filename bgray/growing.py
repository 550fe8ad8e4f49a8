"""Files of lines that grow while they are read: of a local one only what is new is read."""

import contextlib
import json
import os
from typing import Any

from bgray import storage
from bgray.lines import read_lines

TAIL = 256
"""Bytes before the end of what was read that must be the same before more is read behind them."""


class Growing:
    """A .jsonl file, as `read_lines` reads it. On S3, where each writing makes a new file, it is
    read whole each time."""

    def __init__(self, url: str):
        self._url = url
        self._forget()

    def _forget(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self._read, self._tail, self._file = 0, b"", -1
        self.changed: float | None = None
        """Unix time; None where it is not known."""

    def lines(self) -> list[dict[str, Any]]:
        """All of them; the list is the reader's own and grows at the next call. ConfigError for one
        that is damaged."""
        if storage.is_remote(self._url):
            return read_lines(self._url)
        try:
            new = self._new()
        except FileNotFoundError:
            self._forget()
            return []
        found: list[Any] = [None]
        with contextlib.suppress(ValueError, RecursionError):
            found = [json.loads(line) for line in new.splitlines()]
        if not all(isinstance(line, dict) for line in found):
            self._forget()
            return read_lines(self._url)  # which says where
        self._lines += found
        self._read += len(new)
        self._tail = (self._tail + new)[-TAIL:]
        return self._lines

    def _new(self) -> bytes:
        """Whole lines that were not there before. A run that goes on from an earlier step has its
        lines cut, in another file, which may have got the number of the one before it."""
        with open(self._url, "rb") as file:
            facts = os.fstat(file.fileno())
            file.seek(self._read - len(self._tail))
            content = file.read()
            if facts.st_ino != self._file or not content.startswith(self._tail):
                self._forget()
                file.seek(0)
                content = file.read()
            self._file, self.changed = facts.st_ino, facts.st_mtime
        content = content[len(self._tail) :]
        return content[: content.rfind(b"\n") + 1]
