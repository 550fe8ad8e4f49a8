"""The numbers in a sweep's .jsonl files as curves: read when they are asked for and, of a file that
grows, only what is new."""

import contextlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bgray import storage
from bgray.records import METRICS
from bgray.storage import Stamp

Curve = tuple[np.ndarray, np.ndarray]
"""(N,) steps, rising, float64, and (N,) values, float32 or float64; NaN where a value is no
number."""
NONE: Curve = (np.empty(0), np.empty(0))
TAIL = 256
"""Bytes before the end of what was read that must be the same before more is read behind them."""
ENDS = 16384
"""Bytes in which a file's first line, and its last one, are looked for."""
AT_A_TIME = 16
"""Files that come from S3 at once."""
BUDGET = 256 * 1024**2
"""Bytes of training curves that are kept; those that were asked for last."""


class Curves:
    """Of a sweep's runs. For any thread."""

    def __init__(self, url: str, budget: int = BUDGET):
        self._url, self._budget = url, budget
        self.stamps: dict[str, Stamp] = {}
        """Of the files below the sweep's folder, as they are now."""
        self._columns: OrderedDict[str, Columns] = OrderedDict()
        self._names: dict[str, tuple[str, list[str]]] = {}
        self._last: dict[str, tuple[Stamp, int]] = {}
        self._lock = threading.Lock()

    def of(self, run: str, name: str) -> dict[str, Curve]:
        """Columns of a run's file of lines; empty where there is none."""
        return self._read(f"{run}/{name}", True)

    def scores(self, run: str) -> dict[str, Curve]:
        """Those that were evaluated only: of a file of 10000 lines, few."""
        return self._read(f"{run}/{METRICS}", False)

    def last_step(self, run: str, name: str) -> int:
        """That of a file's last line; 0 where there is none."""
        path = f"{run}/{name}"
        stamp = self.stamps.get(path)
        if stamp is None:
            return 0
        if path not in self._last or self._last[path][0] != stamp:
            content = _part(storage.join(self._url, path), stamp, -ENDS)
            self._last[path] = stamp, _last_step(content)
        return self._last[path][1]

    def names(self, runs: Iterable[str]) -> list[str]:
        """Of what these runs log while they train, as their files' first lines say: variants may
        differ in it."""
        found: dict[str, None] = {}
        for run in runs:
            path = f"{run}/{METRICS}"
            stamp = self.stamps.get(path)
            if stamp is None:
                continue
            file = _file(self._url, stamp)
            kept = self._names.get(path)
            if kept is None or not kept[1] or kept[0] != file:
                kept = file, _first_names(_part(storage.join(self._url, path), stamp, ENDS))
                self._names[path] = kept
            found.update(dict.fromkeys(kept[1]))
        return list(found)

    def fetch(self, runs: Iterable[str], name: str) -> None:
        """Read those runs' files at a time where each takes long to come, as from S3."""
        if storage.is_remote(self._url):
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                list(pool.map(lambda run: self.of(run, name), list(runs)))

    def _read(self, path: str, deep: bool) -> dict[str, Curve]:
        with self._lock:
            columns = self._columns.setdefault(path, Columns(storage.join(self._url, path)))
            self._columns.move_to_end(path)
        with columns.lock:
            found = columns.read(self.stamps.get(path), deep)
        with self._lock:
            self._bound(columns)
        return found

    def _bound(self, newest: "Columns") -> None:
        held = sum(columns.size for columns in self._columns.values())
        for path, columns in list(self._columns.items()):
            if held <= self._budget:
                return
            if columns is not newest:
                held -= columns.size
                del self._columns[path]


class Columns:
    """The numbers of one .jsonl file, each name's by step; `val`'s are there under their own
    names. A last line that is torn is left out, as is one that is damaged."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """All that was read."""
        self._stamp: Stamp | None = None
        self._read, self._tail, self._deep = 0, b"", False
        self._found: dict[str, Curve] = {}
        self.size = 0
        """Bytes that are held."""

    def read(self, stamp: Stamp | None, deep: bool) -> dict[str, Curve]:
        """By name, as the file with this stamp has them.

        deep: not only what was evaluated. What lies on S3 is read deep at once: to fetch it again
        would take longer than to keep it.
        """
        deep = deep or self._deep or storage.is_remote(self._url)
        if stamp is None:
            self.forget()
        elif stamp != self._stamp or deep != self._deep:
            try:
                self._update(stamp, deep)
            except FileNotFoundError:  # gone since it was listed
                self.forget()
        return self._found

    def _update(self, stamp: Stamp, deep: bool) -> None:
        more = self._more(stamp) if deep == self._deep else None
        if more is None:
            self.forget()
            more = storage.read_bytes(self._url)
        more = _whole(more)
        found, kept = parsed(more) if deep else evaluated(more), dict(self._found)
        for name, curve in found.items():
            kept[name] = _joined(kept[name], curve) if name in kept else curve
        self._found = kept  # another one: who was given the old one may be going through it
        self._read += len(more)
        self._tail = (self._tail + more)[-TAIL:]
        self._stamp, self._deep = stamp, deep
        arrays = {id(array): array.nbytes for curve in self._found.values() for array in curve}
        self.size = sum(arrays.values())

    def _more(self, stamp: Stamp) -> bytes | None:
        """What was appended since; None where the file is to be read anew."""
        old = self._stamp
        if old is None or stamp.size < self._read or storage.is_remote(self._url):
            return None
        if _file(self._url, old) != _file(self._url, stamp):
            return None
        with open(self._url, "rb") as file:
            file.seek(self._read - len(self._tail))
            content = file.read()
        # A run that goes on from an earlier step has its lines cut, in another file, which may
        # have got the number of the one before it.
        return content[len(self._tail) :] if content.startswith(self._tail) else None


def _file(url: str, stamp: Stamp) -> str:
    """What stays while a local file grows; on S3 each writing makes a new one."""
    return stamp.tag if storage.is_remote(url) else stamp.tag.split()[0]


def _part(url: str, stamp: Stamp, size: int) -> bytes:
    """A file's first or (negative) last bytes; nothing where it is gone."""
    start = max(0, stamp.size + size) if size < 0 else 0
    try:
        with storage.open_file(url) if storage.is_remote(url) else open(url, "rb") as file:
            file.seek(start)
            return file.read(abs(size)) or b""
    except FileNotFoundError:
        return b""


def _last_step(content: bytes) -> int:
    for raw in reversed(content.split(b"\n")):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(raw)["step"])
    return 0


def _first_names(content: bytes) -> list[str]:
    lines = content.split(b"\n")
    return list(parsed(b"\n".join(lines[:1] if len(lines) > 1 else [])))


def _whole(content: bytes) -> bytes:
    """Without a last line that is torn."""
    end = content.rfind(b"\n") + 1
    with contextlib.suppress(ValueError):
        json.loads(content[end:])
        return content
    return content[:end]


def _joined(one: Curve, other: Curve) -> Curve:
    return np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])


# --- lines


def evaluated(content: bytes) -> dict[str, Curve]:
    """What is under `val` in a file's lines; the others are not looked at."""
    lines, at = [], content.find(b'"val"')
    while at >= 0:
        end = content.find(b"\n", at)
        end = len(content) if end < 0 else end
        lines.append(content[content.rfind(b"\n", 0, at) + 1 : end])
        at = content.find(b'"val"', end)
    return _line_by_line(lines, only_val=True)


def parsed(content: bytes) -> dict[str, Curve]:
    """Of a file's lines: what was evaluated, and float32 for the rest."""
    found = _by_arrow(content)
    if found is None:
        return _line_by_line(content.split(b"\n"))
    return {**found, **evaluated(content)}


def _by_arrow(content: bytes) -> dict[str, Curve] | None:
    """Numbers at the top level of lines, four times as fast as line by line; None where a line is
    no object, or a name's values are not of one kind."""
    import pyarrow
    from pyarrow import json as arrow

    # Arrow takes null and what is not there for the same; NaN is a number to it.
    content = content.replace(b":null", b":NaN").replace(b": null", b":NaN")
    if not content.strip():
        return {}
    options = arrow.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        table = arrow.read_json(pyarrow.BufferReader(content), read_options=options)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return None
    if "step" not in table.column_names or table["step"].null_count:
        return None
    if not _is_number(table["step"].type):
        return None
    steps = table["step"].to_numpy().astype(np.float64)
    if not np.isfinite(steps).all():
        return None
    found = {}
    for name in table.column_names:
        column = table[name]
        if name == "step" or not _is_number(column.type) or column.null_count == len(column):
            continue
        there = steps
        if column.null_count:
            there, column = steps[column.is_valid().to_numpy()], column.drop_null()
        with np.errstate(over="ignore"):  # of a run that diverged; infinite is right as well
            found[name] = there, column.to_numpy().astype(np.float32)
    return found


def _is_number(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)


def _line_by_line(lines: Iterable[bytes], only_val: bool = False) -> dict[str, Curve]:
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for raw in lines:
        try:
            line: dict[str, Any] = json.loads(raw)
            step, val = float(line["step"]), line.get("val")
        except (ValueError, TypeError, KeyError):
            continue
        val = val if isinstance(val, dict) else {}
        for name, value in val.items() if only_val else {**line, **val}.items():
            if isinstance(value, int | float) or value is None:
                steps.setdefault(name, []).append(step)
                values.setdefault(name, []).append(math.nan if value is None else value)
    return {
        name: (np.array(steps[name]), np.array(values[name], float))
        for name in steps
        if name != "step"
    }
