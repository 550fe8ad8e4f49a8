"""Folders that may be local or on S3: whole-file reads and writes that are never half visible."""

import contextlib
import dataclasses
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from bgray.problems import ConfigError, first_line
from bgray.retries import Truncated, named, transient, tried

CONNECT_SECONDS, READ_SECONDS = 10, 30
"""Of one request: until there is a connection, and without a single byte of an answer."""
CHUNK = 50 * 2**20  # bytes; longer files are read in ranges of this size, ten at a time


def is_remote(url: str) -> bool:
    """True for `s3://...` and other URLs, False for a path on this machine."""
    return "://" in url


def join(url: str, *parts: str) -> str:
    """`url/part/part`, for local paths and URLs alike."""
    return "/".join([url.rstrip("/") or "/", *parts])


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path within it, for those who use it themselves. S3 honours
    AWS_ENDPOINT_URL (through s3fs); each request is tried some six times, for a minute or so."""
    return _filesystem(url, 6)


def _filesystem(url: str, attempts: int) -> tuple[fsspec.AbstractFileSystem, str]:
    if not url.startswith("s3://"):
        return fsspec.core.url_to_fs(url if is_remote(url) else str(Path(url).absolute()))
    config = {
        "retries": {"mode": "standard", "total_max_attempts": attempts},
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
    }
    # Listings must be fresh: another process may have just written what we look for.
    return fsspec.core.url_to_fs(url, use_listings_cache=False, config_kwargs=config)


def _once(url: str) -> tuple[Any, str]:
    """As `filesystem`, but each request is tried once: botocore's tries, s3fs's and those of
    `tried` would multiply to hours."""
    fs, path = _filesystem(url, 1)
    if url.startswith("s3://"):
        fs.retries = 1  # type: ignore[attr-defined]
    return fs, path


@contextlib.contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """What S3's client alone raises (no credentials, no such host, time-outs) becomes an OSError
    with the url."""
    if not is_remote(url):
        yield
        return
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except BotoCoreError as error:
        raise named(error, url) from error


def exists(url: str) -> bool:
    def ask() -> bool:
        fs, path = _once(url)
        return fs.exists(path)

    return tried(url, ask)


def is_there_now(url: str) -> bool:
    """As `exists`, asked once; False as well where remote storage gives no answer."""
    fs, path = _once(url)
    try:
        return fs.exists(path)
    except Exception as error:
        if transient(error) is None:
            raise named(error, url) from error
        return False


def size(url: str) -> int:
    """Bytes; FileNotFoundError when there is no such file."""

    def ask() -> int:
        fs, path = _once(url)
        return int(fs.size(path) or 0)

    return tried(url, ask)


def read_bytes(url: str) -> bytes:
    """The whole file; FileNotFoundError when there is none."""
    if not is_remote(url):
        return Path(url).read_bytes()

    def read() -> bytes:
        fs, path = _once(url)
        there = int(fs.size(path) or 0)
        if there > CHUNK:
            # Not s3fs's own way of reading in parts, which leaves zeros where one came short.
            starts = list(range(0, there, CHUNK))
            ends = [min(start + CHUNK, there) for start in starts]
            paths = [path] * len(starts)
            parts = fs.cat_ranges(paths, starts, ends, on_error="raise", batch_size=10)
            data = b"".join(parts)
        else:
            # One at a time: otherwise s3fs asks for the size once more.
            options = {"max_concurrency": 1} if url.startswith("s3://") else {}
            data = bytes(fs.cat_file(path, **options))
        if len(data) < there:  # more: somebody has just written a longer one
            raise Truncated(f"{len(data)} of {there} bytes came")
        return data

    return tried(url, read)


def read_json(url: str, way_out: str = "move it away") -> dict[str, Any] | None:
    """The object that a small JSON file holds; None where there is no such file, ConfigError with
    the way out where it is damaged."""
    try:
        found = json.loads(read_bytes(url))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # neither JSON nor, perhaps, UTF-8
        why = first_line(error)
    else:
        if isinstance(found, dict):
            return found
        why = f"no JSON object but {str(found)[:40]!r}"
    raise ConfigError(url, [("", f"is damaged ({why}); {way_out}")])


def open_file(url: str) -> "RemoteFile":
    """A remote file for reading parts of it; FileNotFoundError when there is none."""
    return RemoteFile(url)


class RemoteFile(io.RawIOBase):
    """What pyarrow reads a remote file through: each part whole, or an error."""

    def __init__(self, url: str):
        self._url = url

        def begin() -> Any:
            fs, path = _once(url)
            # Parquet knows which ranges it needs; fsspec's read-ahead would fetch megabytes more.
            return fs.open(path, "rb", cache_type="none")

        self._handle = tried(url, begin)

    def read(self, size: int | None = -1) -> bytes:
        start = self._handle.tell()
        wanted = max(0, self._handle.size - start)
        wanted = wanted if size is None or size < 0 else min(size, wanted)

        def part() -> bytes:
            self._handle.seek(start)
            data = self._handle.read(wanted) if wanted else b""
            if len(data) < wanted:
                raise Truncated(f"{len(data)} of {wanted} bytes came")
            return data

        return tried(self._url, part)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file so that a reader, or a crash, sees the old one or the new one, never a
    part.

    Locally: a temporary file beside it, flushed to disk, then renamed over it. On S3 one PUT is
    atomic.
    """
    if is_remote(url):

        def put() -> None:
            fs, path = _once(url)
            fs.pipe_file(path, data)

        return tried(url, put, len(data))
    target = Path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(
            name, 0o644
        )  # mkstemp makes 0600, which a colleague on the same machine cannot read
        os.replace(name, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = url  # a full disk does not say which
        raise


def leftovers(url: str, name: str) -> dict[str, int]:
    """Temporary files in a local folder that writes of a file `name` (a pattern) left when they
    were killed, or that are just being written: path to time of the last change in ns."""
    pattern, found = re.compile(rf"\.{name}\.[a-z0-9_]{{8}}"), {}
    if not is_remote(url) and os.path.isdir(url):
        for entry in os.scandir(url):
            with contextlib.suppress(FileNotFoundError):
                if pattern.fullmatch(entry.name):
                    found[entry.path] = entry.stat().st_mtime_ns
    return found


def listdir(url: str) -> list[str]:
    """Names (not paths) in a folder, sorted; empty when there is no such folder."""

    def ask() -> list[str]:
        fs, path = _once(url)
        return fs.ls(path, detail=False) if fs.exists(path) else []

    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in tried(url, ask)]
    return sorted(name for name in names if name and not name.startswith("."))


@dataclasses.dataclass(frozen=True)
class Stamp:
    """Differs when a file has changed."""

    size: int
    changed: float
    """Unix time."""
    tag: str
    """Of the very file: another one of that name has another."""


def stamps(url: str, skip: tuple[str, ...] = ()) -> dict[str, Stamp]:
    """Every file below a folder by its path there ("a/b.txt"), but hidden ones and what lies in
    folders named in `skip`; empty when there is no such folder."""
    if not is_remote(url):
        return dict(_local_stamps(url, "", skip))

    def ask() -> dict[str, Stamp]:
        fs, path = _once(url)
        found = {}
        for name, info in fs.find(path, detail=True).items():
            parts = name[len(path) :].strip("/").split("/")
            if not any(part.startswith(".") for part in parts) and not {*parts[:-1]} & {*skip}:
                when = info.get("LastModified") or info.get("mtime") or info.get("created")
                changed = when.timestamp() if hasattr(when, "timestamp") else float(when or 0)
                tag = str(info.get("ETag") or changed)
                found["/".join(parts)] = Stamp(int(info["size"] or 0), changed, tag)
        return found

    return tried(url, ask)


def _local_stamps(folder: str, prefix: str, skip: tuple[str, ...]) -> Iterator[tuple[str, Stamp]]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # gone since
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name not in skip:
                    yield from _local_stamps(entry.path, f"{prefix}{entry.name}/", skip)
            else:
                found = entry.stat()
                tag = f"{found.st_ino} {found.st_mtime_ns}"
                yield prefix + entry.name, Stamp(found.st_size, found.st_mtime, tag)


def remove(url: str) -> None:
    """Delete one file; nothing happens when it is not there."""

    def delete() -> None:
        fs, path = _once(url)
        fs.rm_file(path)

    with contextlib.suppress(FileNotFoundError):
        tried(url, delete)
