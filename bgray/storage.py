"""Folders that may be local or on S3: whole-file reads and writes that are never half visible."""

import contextlib
import os
import tempfile
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


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return fs.exists(path)


def read_bytes(url: str) -> bytes:
    """The whole file; FileNotFoundError when there is none."""
    if not is_remote(url):
        return Path(url).read_bytes()
    fs, path = filesystem(url)
    return bytes(fs.cat_file(path))  # type: ignore[arg-type]


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file so that a reader, or a crash, sees the old one or the new one, never a
    part.

    Locally: a temporary file beside it, flushed to disk, then renamed over it. On S3 one PUT is
    atomic.
    """
    if is_remote(url):
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
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def listdir(url: str) -> list[str]:
    """Names (not paths) in a folder, sorted; empty when there is no such folder."""
    fs, path = filesystem(url)
    if not fs.exists(path):
        return []
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    return sorted(name for name in names if name and not name.startswith("."))


def remove(url: str) -> None:
    """Delete one file; nothing happens when it is not there."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)
