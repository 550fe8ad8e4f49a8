"""Finished work units on a local disk, for every process there that wants the same: made once, read
by mapping, and never in the way of training."""

import contextlib
import fcntl
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bgray import data, unit_file
from bgray.config import FeedCache
from bgray.data import Recipe
from bgray.feed_key import Unsure, key_of
from bgray.feed_room import MAKING, READER, UNIT, USED, Wish, register, reserve
from bgray.unit_file import Damaged, Unit

WAIT_SECONDS = 60.0
"""At most, for a unit that another process makes."""
PAUSE_SECONDS = 0.02
RETRY_SECONDS = 60.0
"""After an error of the disk nothing is stored for so long."""
TOLD_SECONDS = 30.0
AHEAD = 8
"""Units beyond the one that is waited for, of which one may be made meanwhile."""
COUNTED = ("hits", "made", "waited", "not_stored")
TRIED = 4
"""Units that are stored before it is judged whether that pays."""


def _this_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:12]
    except OSError:
        return UNKNOWN


UNKNOWN = "0"
"""Where it cannot be told: then every file is checked as a whole."""
BOOT = _this_boot()


def _mean(values: deque[float]) -> float:
    return sum(values) / max(1, len(values))


class UnitCache:
    """The units of one stream (a recipe, a rank of a world) in a folder that all streams share.

    A unit is `<folder>/<key of the stream>/<its first step>-<boot>.arrow`. `<first step>.making`
    is one that is being made: locked by its maker, so that the kernel frees it when that dies.
    `reader-...` says, locked as well, how far a reader is.
    """

    def __init__(
        self, settings: FeedCache, recipe: Recipe, rank: int = 0, world: int = 1, reader: str = ""
    ):
        """reader: the name, in files, of whom units are for; of the process that makes them for
        one that registered elsewhere, that one's."""
        self.settings, self.recipe, self._ranks = settings, recipe, (rank, world)
        self.root, self.key = Path(settings.path), ""
        self.notes: list[str] = []
        """What a person should know, each once."""
        self.hits = self.made = self.waited = self.not_stored = 0
        self.reader = reader or f"{READER}{os.uname().nodename}-{os.getpid()}-{id(self)}"
        self._registered: int | None = None
        self._own: set[int] = set()  # made before their turn
        self._size = 0
        self._rest_until = self._used_at = 0.0
        # CPU seconds of the last ones.
        self._makes, self._stores = deque[float](maxlen=16), deque[float](maxlen=16)
        try:
            self.key = key_of(recipe, rank, world)
        except (Unsure, TypeError) as error:
            self._note(f"no units are kept or taken: {error}")
        self.folder = self.root / (self.key or "none")
        self._older = self._of_older_boots()

    # --- what a feed asks for

    def unit(self, number: int, last: int) -> Unit:
        """The unit, from the cache or made now; the last one that will be asked for is `last`."""
        deadline, waited = time.monotonic() + WAIT_SECONDS, False
        while self.key:
            if (found := self.look(number)) is not None:
                if number in self._own:
                    self._own.discard(number)
                else:
                    self.hits += 1
                    self.waited += waited
                return found
            if not self._may_store() or time.monotonic() > deadline:
                break
            with self._claim(number) as claim:
                # Somebody may have been done with it between the look and the claim.
                if claim is not None and not self.has(number):
                    return self._make_and_keep(number, claim)
            if claim is None and self.key:
                waited = True
                if not self._made_ahead(number, last):
                    time.sleep(PAUSE_SECONDS)
        self.not_stored += 1
        return self.make(number)

    def look(self, number: int) -> Unit | None:
        """The unit, if it is there and whole; read-only arrays."""
        if not self.key:
            return None
        older = self._older.get(number)
        path, found = older or self._path(number), None
        try:
            whole = older is not None or BOOT == UNKNOWN
            found = unit_file.read(path, self._name(number), whole=whole)
        except FileNotFoundError:
            self._older.pop(number, None)
        except Damaged as error:
            self._older.pop(number, None)
            self._note(f"{error}; it is made anew")
            try:
                path.unlink(missing_ok=True)
            except OSError as kept:
                self._trouble(kept)
        except OSError as error:
            self._trouble(error)
        if older is not None and found is None:
            return self.look(number)  # perhaps another process has just checked and renamed it
        if found is not None:
            self._size = unit_file.size_of(found)
            if older is not None:
                with contextlib.suppress(OSError):
                    os.rename(older, self._path(number))  # no need to check all of it again
                    self._older.pop(number)
        return found

    def has(self, number: int) -> bool:
        """Whether its file is there; it may be damaged, or gone when it is asked for."""
        return bool(self.key) and (number in self._older or self._path(number).exists())

    def run_from(self, number: int, last: int) -> int:
        """The first unit, from this one on, that is not there; after `last` if all are."""
        while number <= last and self.has(number):
            number += 1
        return number

    def keep(self, number: int, unit: Unit) -> None:
        """Store one that was made elsewhere, if there is room."""
        self.made += 1
        stored = False
        if self._may_store():
            with self._claim(number) as claim:
                if claim is not None and not self.has(number):
                    stored = self._store(number, claim, unit)
        self.not_stored += not stored

    def record(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """For run.json; with what earlier tries of the run had."""
        counts = {name: getattr(self, name) + earlier.get(name, 0) for name in COUNTED}
        taken = counts["hits"] + counts["made"]
        rate = round(counts["hits"] / taken, 4) if taken else None
        return {**asdict(self.settings), **counts, "hit_rate": rate}

    def news(self) -> dict[str, Any]:
        """What has happened since it was last asked for: for `add`, in another process."""
        found: dict[str, Any] = {name: getattr(self, name) for name in COUNTED}
        for name in COUNTED:
            setattr(self, name, 0)
        found["notes"], self.notes = self.notes, []
        return found

    def add(self, news: dict[str, Any]) -> None:
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + news.get(name, 0))
        self.notes += [text for text in news.get("notes", ()) if text not in self.notes]

    def close(self) -> None:
        """Tell others that there is one reader less."""
        if self._registered is not None:
            with contextlib.suppress(OSError):
                (self.folder / self.reader).unlink()
            os.close(self._registered)
            self._registered = None

    # --- making

    def make(self, number: int) -> Unit:
        began = time.thread_time()
        unit = data.make_unit(self.recipe, number, *self._ranks)
        self._makes.append(time.thread_time() - began)
        self.made += 1
        return unit

    def _make_and_keep(self, number: int, claim: int) -> Unit:
        """Its room is reserved first where its size is known: nobody should wait for a unit that is
        not stored then."""
        room = self._size > 0 and self._reserve(number, claim, self._size)
        if self._size and not room:
            self._unclaim(number, claim)
            self.not_stored += 1
            return self.make(number)
        unit = self.make(number)
        self.not_stored += not self._store(number, claim, unit, reserved=room)
        return unit

    def _made_ahead(self, number: int, last: int) -> bool:
        """Make a later unit while another process makes this one: so trials in lockstep share the
        work, and do not only wait for each other."""
        for later in range(number + 1, min(number + AHEAD, last) + 1):
            if self._size and not self.has(later) and self._may_store():
                with self._claim(later) as claim:
                    if claim is None or self.has(later):
                        continue
                    missed = self.not_stored
                    try:
                        self._make_and_keep(later, claim)
                    except Exception:  # it is raised when that unit's turn comes
                        return False
                    if self.not_stored == missed:
                        self._own.add(later)
                    return True
        return False

    # --- storing

    def _may_store(self) -> bool:
        if not self.key or time.monotonic() < self._rest_until:
            return False
        if len(self._stores) < TRIED or _mean(self._stores) < _mean(self._makes):
            return True
        self._note("units are made as cheaply as they are stored: they are not kept")
        return False

    @contextlib.contextmanager
    def _claim(self, number: int) -> Iterator[int | None]:
        """The descriptor of the file in which only this process makes the unit; None where another
        one is at it, or nothing can be written."""
        path, fd, mine = self._making(number), None, False
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who had it may have published or removed it meanwhile.
                mine = os.fstat(fd).st_ino == os.stat(path).st_ino
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError as error:
                self._trouble(error)
            yield fd if mine else None
        finally:
            if fd is not None:
                if mine:
                    self._unclaim(number, fd)
                os.close(fd)

    def _unclaim(self, number: int, fd: int) -> None:
        """Remove the file of a claim, if it is still that."""
        path = self._making(number)
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                path.unlink()

    def _store(self, number: int, claim: int, unit: Unit, *, reserved: bool = False) -> bool:
        began = time.thread_time()
        size = unit_file.size_of(unit)
        try:
            if not (reserved and size == self._size or self._reserve(number, claim, size)):
                return False
            os.lseek(claim, 0, os.SEEK_SET)
            unit_file.write(claim, unit, self._name(number))
            os.ftruncate(claim, os.lseek(claim, 0, os.SEEK_CUR))
            os.rename(self._making(number), self._path(number))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(claim, 0)
            self._trouble(error)
            return False
        self._size = size
        self._stores.append(time.thread_time() - began)
        return True

    def _reserve(self, number: int, claim: int, size: int) -> bool:
        """Give the claim's file its size, if bound and disk allow it, once others have gone where
        that is right."""
        began = time.monotonic()
        per_unit = self.recipe.batches_per_unit
        wish = Wish(self.folder, self._step(number), per_unit, size, self.reader)
        try:
            if reserve(self.settings, wish, claim):
                return True
        except OSError as error:
            self._trouble(error)
            return False
        # Looking through a full folder is not to cost more than units do.
        self._rest_until = time.monotonic() + 20 * (time.monotonic() - began)
        return False

    # --- names

    def _step(self, number: int) -> int:
        return number * self.recipe.batches_per_unit

    def _name(self, number: int) -> str:
        return f"{self.key} {self._step(number)}"

    def _path(self, number: int) -> Path:
        return self.folder / f"{self._step(number):09d}-{BOOT}.arrow"

    def _making(self, number: int) -> Path:
        return self.folder / f"{self._step(number):09d}{MAKING}"

    def _of_older_boots(self) -> dict[int, Path]:
        """Unit to file."""
        found = {}
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if (match := UNIT.fullmatch(path.name)) and match[2] != BOOT:
                    found[int(match[1]) // self.recipe.batches_per_unit] = path
        return found

    # --- saying

    def tell(self, number: int) -> None:
        """Let others see that this reader is at a unit, and that the stream is in use."""
        if not self.key:
            return
        with contextlib.suppress(OSError):  # in a folder that one may only read, it stays unknown
            if self._registered is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._registered = register(self.folder / self.reader)
            os.pwrite(self._registered, b"%020d" % self._step(number), 0)
            if time.monotonic() - self._used_at > TOLD_SECONDS:
                self._used_at = time.monotonic()
                (self.folder / USED).touch()

    def _trouble(self, error: OSError) -> None:
        """Nothing is stored for a while; training goes on."""
        self._rest_until = time.monotonic() + RETRY_SECONDS
        where = f" ({error.filename})" if error.filename else ""
        self._note(f"{error.strerror or error}{where}: for a while units are made and not kept")

    def _note(self, text: str) -> None:
        text = f"feed cache {self.root}: {text}"
        if text not in self.notes:
            self.notes.append(text)
