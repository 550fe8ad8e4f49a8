"""What lies in the feed cache's folder, and what goes, under one lock, when there is no room."""

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bgray.config import FeedCache

GIB = 1024**3
LEFT_FREE_GIB, LEFT_FREE = 2.0, 0.05
"""Of the disk, whatever the cache may hold: GiB and share, the larger of the two."""
LIVE_SECONDS = 3600.0
"""A stream that somebody read within so long is in use."""
RECOUNT_SECONDS = 30.0
"""So long a sum is believed, with what was added to it."""
LOCK_SECONDS = 5.0
WINDOW = 0.125
"""Of the bound: how far behind, in bytes, another reader may be to have units kept for it alone."""
STREAM = re.compile(r"[0-9a-f]{32}")
UNIT = re.compile(r"(\d+)-([0-9a-f]+)\.arrow")
MAKING, READER, USED, LOCK = ".making", "reader-", "used", "lock"


@dataclass(frozen=True)
class Wish:
    """Room for a unit."""

    folder: Path
    """Of its stream."""
    step: int
    """Its first."""
    steps: int
    """In a unit."""
    size: int
    """Bytes."""
    reader: str
    """Name of who wants it."""


@dataclass(frozen=True)
class File:
    path: Path
    size: int
    step: int | None
    """Of a unit; None of anything else."""


def reserve(settings: FeedCache, wish: Wish, fd: int) -> bool:
    """Give the file its size, if bound and disk allow it; what has to go is removed first. False
    where only units would go that are worth more than this one."""
    root = wish.folder.parent
    with _alone(root / LOCK) as ledger:
        if not _room(settings, wish, ledger):
            return False
        _allocate(fd, wish.size)
        return True


def _room(settings: FeedCache, wish: Wish, ledger: int) -> bool:
    root, bound, now = wish.folder.parent, settings.gib * GIB, time.time()
    disk = os.statvfs(root)
    floor = max(LEFT_FREE_GIB * GIB, LEFT_FREE * disk.f_frsize * disk.f_blocks)
    spare = disk.f_frsize * disk.f_bavail - floor
    used, counted = _read_ledger(ledger)
    believed = 0 <= now - counted < RECOUNT_SECONDS
    if not believed or used + wish.size > bound or wish.size > spare:
        files = scan(root)
        used, counted = sum(file.size for file in files), now
        over = max(used + wish.size - bound, wish.size - spare)
        victims, freed = [], 0
        for file in _victims(files, wish, settings) if over > 0 else ():
            if freed >= over:
                break
            victims.append(file)
            freed += file.size
        if freed < over:
            _write_ledger(ledger, used, counted)
            return False
        for file in victims:
            file.path.unlink(missing_ok=True)
        for folder in {file.path.parent for file in victims} - {wish.folder}:
            _forget_empty(folder)
        used -= freed
    _write_ledger(ledger, used + wish.size, counted)
    return True


def _victims(files: list[File], wish: Wish, settings: FeedCache) -> list[File]:
    """What may go for a unit, in that order: units of streams that nobody has used for long; units
    later than this one, for trials are many at the start and few at the end; and where another
    reader is so close behind that it will get this one, what all readers have passed.

    Never earlier units of a stream in use for this one's sake: with LRU several trials that scan
    one after the other would each find nothing (CoorDL, VLDB'21).
    """
    streams: dict[Path, list[tuple[int, File]]] = {}
    for file in files:
        if file.step is not None:
            streams.setdefault(file.path.parent, []).append((file.step, file))
    old = time.time() - LIVE_SECONDS
    used = {folder: last_used(folder) for folder in streams}
    dead = [f for f in streams if used[f] < old and f != wish.folder and not readers(f)]
    found: list[File] = []
    for folder in sorted(dead, key=lambda folder: used[folder]):
        found += _latest_first(streams.pop(folder))
    alive = [pair for pairs in streams.values() for pair in pairs]
    found += _latest_first([pair for pair in alive if pair[0] > wish.step])
    places = readers(wish.folder)
    reach = WINDOW * settings.gib * GIB / wish.size * wish.steps
    others = [step for name, step in places.items() if name != wish.reader]
    if any(0 <= wish.step - step <= reach for step in others):
        passed = min(places.values())
        own = streams.get(wish.folder, [])
        found += _latest_first([pair for pair in own if pair[0] + wish.steps <= passed])
    return found


def _latest_first(units: list[tuple[int, File]]) -> list[File]:
    return [file for _, file in sorted(units, key=lambda pair: pair[0], reverse=True)]


def scan(root: Path) -> list[File]:
    """Every file of the folder; of dead makers' files nothing is left."""
    found = []
    for folder in [root, *(p for p in root.iterdir() if STREAM.fullmatch(p.name))]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as each:
            for entry in each:
                path = folder / entry.name
                if entry.is_dir(follow_symlinks=False):
                    continue
                if entry.name.endswith(MAKING) and folder != root and _removed_if_dead(path):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    match = UNIT.fullmatch(entry.name) if folder != root else None
                    size = entry.stat(follow_symlinks=False).st_size
                    found.append(File(path, size, int(match[1]) if match else None))
    return found


def used_bytes(root: Path) -> int:
    try:
        return sum(file.size for file in scan(root))
    except OSError:
        return 0


def register(path: Path) -> int:
    """A file that is there as long as its process is, its lock freed by the kernel."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def readers(folder: Path) -> dict[str, int]:
    """Name to step of everyone who reads a stream now."""
    found = {}
    for path in folder.glob(f"{READER}*"):
        if not _removed_if_dead(path):
            with contextlib.suppress(OSError, ValueError):
                found[path.name] = int(path.read_bytes())
    return found


def last_used(folder: Path) -> float:
    """Seconds since the epoch."""
    try:
        return (folder / USED).stat().st_mtime
    except OSError:
        return 0.0


def _removed_if_dead(path: Path) -> bool:
    """Whether it was nobody's, and is gone now."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == os.stat(path).st_ino:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _forget_empty(folder: Path) -> None:
    """Of a stream without units; one who begins with it now makes its folder again."""
    with contextlib.suppress(OSError):
        if all(path.name == USED for path in folder.iterdir()):
            (folder / USED).unlink(missing_ok=True)
            folder.rmdir()


def _allocate(fd: int, size: int) -> None:
    os.ftruncate(fd, 0)
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(fd, size)
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            os.ftruncate(fd, 0)
            raise
        os.ftruncate(fd, size)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Only one process at a time is in here, for each root; yields the ledger."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "locked by another process") from None
                time.sleep(0.002)
        yield fd
    finally:
        os.close(fd)


def _read_ledger(fd: int) -> tuple[int, float]:
    """Bytes in use, and when they were counted."""
    try:
        used, counted = os.pread(fd, 64, 0).split()
        return int(used), float(counted)
    except ValueError:
        return 0, 0.0


def _write_ledger(fd: int, used: int, counted: float) -> None:
    os.pwrite(fd, b"%20d %20.3f" % (used, counted), 0)
