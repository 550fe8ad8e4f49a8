"""The file of a lease, here or on S3: written only over what was read, so that of many who try at
once one succeeds."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from bgray import storage
from bgray.retries import tried

HEAD, DIGITS = '{"beat": ', 10
"""How the text begins: the counter has a fixed place and width, to be overwritten there."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
"""What file systems without locks, or without hard links, answer."""
OLD_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Found:
    raw: bytes
    version: str = ""
    """S3's ETag."""


class Store(Protocol):
    def read(self) -> Found | None:
        """What is there now."""
        ...

    def glance(self) -> Found | None:
        """As `read`, without patience."""
        ...

    def put(self, text: bytes, over: Found | None, token: str) -> bool:
        """Write it over exactly what was found (None: no file); False when another was faster."""
        ...

    def beat(self, text: bytes, token: str) -> Found | None:
        """Write a newer text of the same length, but over our own only; what is there."""
        ...

    def remove(self, token: str) -> None:
        """Delete our own only."""
        ...


class Local:
    """A file that is linked or renamed into place, the latter under a lock on the one it replaces.

    The heartbeat is written into the open file: of one that was replaced it changes nothing. Where
    there are no locks or links, what counts is who has written last.
    """

    def __init__(self, path: str, settle_seconds: float):
        self._path, self._settle_seconds, self._handle = path, settle_seconds, -1

    def read(self) -> Found | None:
        try:
            return Found(Path(self._path).read_bytes())
        except FileNotFoundError:
            return None

    glance = read

    def put(self, text: bytes, over: Found | None, token: str) -> bool:
        name, handle, firm = "", -1, True
        try:
            folder = os.path.dirname(self._path)
            os.makedirs(folder or ".", exist_ok=True)
            handle, name = tempfile.mkstemp(
                dir=folder or ".", prefix=f".{os.path.basename(self._path)}."
            )
            if os.write(handle, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
            os.fchmod(handle, 0o644)
            firm = self._link(name) if over is None else self._replace(name, over)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self._path) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            self._close()
            self._handle = handle
        if not firm:
            time.sleep(self._settle_seconds)
        if self._ours(token):
            self._tidy()
            return True
        self._close()
        return False

    def _tidy(self) -> None:
        """Delete what was left by others who were killed in `put` long ago."""
        now = os.fstat(self._handle).st_mtime_ns  # by the clock of the folder's machine
        folder, name = os.path.split(self._path)
        for path, changed in storage.leftovers(folder or ".", re.escape(name)).items():
            if changed < now - OLD_SECONDS * 10**9:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _link(self, name: str) -> bool:
        try:
            os.link(name, self._path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if not os.path.exists(self._path):
                os.replace(name, self._path)
            return False
        return True

    def _replace(self, name: str, over: Found) -> bool:
        with self._alone() as (raw, firm):
            if raw == over.raw:
                os.replace(name, self._path)
        return firm

    @contextlib.contextmanager
    def _alone(self) -> Iterator[tuple[bytes | None, bool]]:
        """(the file's content, or None where another process is at it; whether there are locks).
        Until the end nobody else who asks so replaces or deletes it."""
        try:
            handle = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            yield None, True
            return
        firm = True
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None, True
                return
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                firm = False
            try:  # or it was replaced before the lock was ours
                same = os.path.samestat(os.fstat(handle), os.stat(self._path))
            except FileNotFoundError:
                same = False
            yield (os.read(handle, 2**16) if same else None), firm
        finally:
            if firm:  # closing alone would leave it with a fork
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _ours(self, token: str) -> bool:
        found = self.read()
        return found is not None and token.encode() in found.raw

    def beat(self, text: bytes, token: str) -> Found | None:
        if self._ours(token):
            os.pwrite(self._handle, text[len(HEAD) : len(HEAD) + DIGITS], len(HEAD))
            os.fsync(self._handle)  # another machine of a network file system is to see it
        return self.read()

    def remove(self, token: str) -> None:
        self._close()
        for _ in range(40):  # whoever else has the lock sees that the lease lives, and goes
            if not self._ours(token):
                return
            with self._alone() as (raw, _firm):
                if raw is not None and token.encode() in raw:
                    os.unlink(self._path)
                    return
            time.sleep(0.05)

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


class Remote:
    """An object that is written on a condition: that there is none, or that it is still the one
    that was read. Of storage that does not know conditions the last writer has it."""

    def __init__(self, url: str, settle_seconds: float):
        self._url, self._settle_seconds, self._version = url, settle_seconds, ""
        self._firm = url.startswith("s3://")

    def read(self) -> Found | None:
        return tried(self._url, self.glance)

    def glance(self) -> Found | None:
        with storage.plain_errors(self._url):
            fs, path = storage._once(self._url)
            try:
                # The version first: were it that of a later content, our write would be granted.
                version = fs.info(path).get("ETag", "")
                options = {"max_concurrency": 1} if self._url.startswith("s3://") else {}
                return Found(bytes(fs.cat_file(path, **options)), version)
            except FileNotFoundError:
                return None

    def put(self, text: bytes, over: Found | None, token: str) -> bool:
        condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over.version}
        granted = self._firm and tried(self._url, lambda: self._granted(text, condition))
        # A second time it must be refused; some S3 servers ignore what they do not know.
        if granted and tried(self._url, lambda: self._granted(text, condition)):
            self._firm = False
        if not self._firm:
            if not granted and self.read() == over:
                storage.write_bytes(self._url, text)
            time.sleep(self._settle_seconds)
        return self._ours(self.read(), token)

    def _granted(self, text: bytes, condition: dict[str, str], act: str = "put_object") -> bool:
        fs, path = storage._once(self._url)
        bucket, key, _ = fs.split_path(path)
        body = {"Body": text} if act == "put_object" else {}
        try:
            answer = fs.call_s3(act, Bucket=bucket, Key=key, **body, **condition)
        except Exception as error:
            status, code = _answer(error)
            if status in (409, 412) or code == "NoSuchKey":
                return False
            if status == 501 or (status == 400 and not body):
                self._firm = False
                return False
            raise
        self._version = answer.get("ETag", "")
        return True

    def _ours(self, found: Found | None, token: str) -> bool:
        ours = found is not None and token.encode() in found.raw
        if found is not None and ours:
            self._version = found.version
        return ours

    def beat(self, text: bytes, token: str) -> Found | None:
        with storage.plain_errors(self._url):
            if self._firm and self._granted(text, {"IfMatch": self._version}):
                return Found(text, self._version)
            if not self._firm and self._ours(self.glance(), token):
                fs, path = storage._once(self._url)
                fs.pipe_file(path, text)
            # After a refusal too: an earlier write may have got there although its answer did not.
            self._ours(found := self.glance(), token)
            return found

    def remove(self, token: str) -> None:
        found = self.read()
        if found is None or not self._ours(found, token):
            return
        if self._firm:
            condition = {"IfMatch": found.version}
            tried(self._url, lambda: self._granted(b"", condition, "delete_object"))
        if not self._firm:
            storage.remove(self._url)


def _answer(error: BaseException | None) -> tuple[int, str]:
    """S3's status and code for a refusal; s3fs keeps them as the cause of its own error."""
    while error is not None:
        if isinstance(answer := getattr(error, "response", None), dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, str(answer.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return 0, ""
