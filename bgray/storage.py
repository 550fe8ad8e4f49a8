"""Folders that may be local or on S3: whole-file reads and writes that are never half visible."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec


def is_remote(url: str) -> bool:
    """True for `s3://...` and other URLs, False for a path on this machine."""
    return "://" in url


def join(url: str, *parts: str) -> str:
    """`url/part/part`, for local paths and URLs alike."""
    return "/".join([url.rstrip("/") or "/", *parts])


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path within it. S3 honours AWS_ENDPOINT_URL (through
    s3fs)."""
    # Listings must be fresh: another process may have just written what we look for.
    options = {"use_listings_cache": False} if url.startswith("s3://") else {}
    return fsspec.core.url_to_fs(url if is_remote(url) else str(Path(url).absolute()), **options)


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
        raise OSError(errno.EIO, str(error), url) from error


def exists(url: str) -> bool:
    with plain_errors(url):
        fs, path = filesystem(url)
        return fs.exists(path)


def size(url: str) -> int:
    """Bytes; FileNotFoundError when there is no such file."""
    with plain_errors(url):
        fs, path = filesystem(url)
        return int(fs.size(path) or 0)


def read_bytes(url: str) -> bytes:
    """The whole file; FileNotFoundError when there is none."""
    if not is_remote(url):
        return Path(url).read_bytes()
    with plain_errors(url):
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path))  # type: ignore[arg-type]


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file so that a reader, or a crash, sees the old one or the new one, never a
    part.

    Locally: a temporary file beside it, flushed to disk, then renamed over it. On S3 one PUT is
    atomic.
    """
    if is_remote(url):
        with plain_errors(url):
            fs, path = filesystem(url)
            fs.pipe_file(path, data)
        return
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
    with plain_errors(url):
        fs, path = filesystem(url)
        if not fs.exists(path):
            return []
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    return sorted(name for name in names if name and not name.startswith("."))


def remove(url: str) -> None:
    """Delete one file; nothing happens when it is not there."""
    with plain_errors(url), contextlib.suppress(FileNotFoundError):
        fs, path = filesystem(url)
        fs.rm_file(path)
