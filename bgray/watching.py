"""The sweeps that a page watches: one folder, or a folder of them, read no oftener than needed."""

import contextlib
import difflib
import itertools
import threading
import time
from collections import OrderedDict
from pathlib import Path

from bgray import leases, storage
from bgray.problems import ConfigError
from bgray.reading import SKIPPED, Reader, sweeps
from bgray.results import Results

LOCAL_SECONDS, REMOTE_SECONDS = 2.0, 15.0
"""Between two looks at a folder: a listing on S3 costs time and money."""
HELD = 6  # sweeps whose curves stay in memory; the one looked at longest ago is given up
EARLY = (leases.NAME, "validation-", "sweep.json", "experiment.yaml")
"""Files that a sweep writes before its first run begins."""


class Watch:
    """A folder of RESULTS. For any thread.

    ConfigError where there is nothing of the kind; a folder in which a sweep may yet begin is fine.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/") or "/"
        self.seconds = REMOTE_SECONDS if storage.is_remote(url) else LOCAL_SECONDS
        self._lock = threading.Lock()
        self._places: dict[str, str] = {}
        self._looked = float("-inf")
        self._sweeps: OrderedDict[str, _Sweep] = OrderedDict()
        refuse(self.url)
        self.names()

    def names(self) -> list[str]:
        """Of the sweeps that are there by now, sorted; empty while none has begun."""
        with self._lock:
            if time.monotonic() - self._looked >= self.seconds:
                try:
                    found = sweeps(self.url)
                except ConfigError:
                    found = []
                # A sweep that is gone is said to be gone by its own reader.
                self._places |= {place.rsplit("/", 1)[-1]: place for place in found}
                self._looked = time.monotonic()
            return sorted(self._places)

    def look(self, name: str) -> tuple[str, Results]:
        """(version, the sweep as it is now): another version where anything has changed.

        LookupError where no sweep has that name; ConfigError or OSError where it cannot be read.
        """
        with self._lock:
            place = self._places.get(name)
            if place is None:
                raise LookupError(name)
            sweep = self._sweeps.pop(name, None) or _Sweep(place, self.seconds)
            self._sweeps[name] = sweep
            while len(self._sweeps) > HELD:
                self._sweeps.popitem(last=False)
        return sweep.look()

    def warm(self) -> None:
        """Read the first sweep, for a page that is about to ask for it."""
        with contextlib.suppress(LookupError, ConfigError, OSError):
            for name in self.names()[:1]:
                _ = self.look(name)[1].entries


class _Sweep:
    # Of this server's life: a page that stayed open must not take another one's version for its.
    born = f"{time.time_ns():x}"
    numbers = itertools.count(1)

    def __init__(self, url: str, seconds: float):
        self._reader, self._seconds = Reader(url), seconds
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._found: tuple[str, Results] | None = None

    def look(self) -> tuple[str, Results]:
        with self._lock:
            # Half, so that a page whose clock is a little early is not told old news.
            if self._found is None or time.monotonic() - self._looked >= self._seconds / 2:
                results = self._reader.read()
                if self._found is None or self._found[1] is not results:
                    self._found = f"{self.born}-{next(self.numbers)}", results
                self._looked = time.monotonic()
            return self._found


def refuse(url: str) -> None:
    """ConfigError where `url` is neither a sweep, nor a folder of sweeps, nor a folder in which
    one may yet begin."""
    try:
        sweeps(url)
        return
    except ConfigError as error:
        refused = error
    there = storage.stamps(url, skip=(*SKIPPED, "clips"))
    local = not storage.is_remote(url)
    if local and Path(url).is_file():
        raise ConfigError(url, [("", "is a file; give a sweep's folder, or one of sweeps")])
    if not there and not (local and Path(url).is_dir()):
        raise ConfigError(url, [("", f"there is no such folder{_near(url)}")])
    # Hidden files apart: Tune's own are in .ray before the first run begins.
    if any(not path.rsplit("/", 1)[-1].startswith(EARLY) for path in there):
        raise refused


def _near(url: str) -> str:
    """What there is instead, as the end of a sentence."""
    parent, _, name = url.rpartition("/")
    try:
        beside = storage.listdir(parent or ("/" if url.startswith("/") else "."))
    except OSError:
        beside = []
    near = difflib.get_close_matches(name, beside, 1, cutoff=0.6)
    if near:
        return f", did you mean {storage.join(parent, near[0]) if parent else near[0]}?"
    return "; give a sweep's folder (results/quickstart), or one of sweeps (results)"
