"""Trying again while remote storage misbehaves: what is worth it, for how long, and what to say."""

import collections
import contextlib
import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

RETRY_SECONDS = 300.0
"""So long an operation on remote storage is tried; the last try may take a request's time more."""
PAUSE_SECONDS = (1.0, 20.0)
"""Between the first tries and between late ones; drawn from half of it to all of it, so that the
machines of a cluster do not all come back at the same moment."""
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 10.0, 1e6
"""An answer that takes longer than both allow together is worth a line."""
WORD_AFTER_SECONDS = 10.0
"""An operation that is tried for longer says that it waits, once."""
GIVEN_UP_SECONDS = 60.0
"""After giving up on a bucket everything else is tried just once for so long: saying how a run
ended must not take as long again."""
KEPT = 100  # incidents, until somebody asks for them

TRANSIENT = {
    "EndpointConnectionError": "no connection",  # refused, no route, no such host
    "ConnectTimeoutError": "no connection in time",
    "ConnectionClosedError": "connection closed",
    "ReadTimeoutError": "no answer in time",
    "ResponseStreamingError": "answer cut short",
    "ClientPayloadError": "answer cut short",
    "IncompleteRead": "answer cut short",
    "IncompleteReadError": "answer cut short",
    "ResponseParserError": "answer not understood",
    "ChecksumError": "answer damaged on the way",
    "FlexibleChecksumError": "answer damaged on the way",
    "HTTPClientError": "connection failed",
    "ConnectionError": "connection failed",  # Python's own (reset, refused) and botocore's
    "ClientConnectionError": "connection failed",
    "TimeoutError": "no answer in time",
}
"""Errors that are worth another try, by the name of their class or of one that it is made from, as
botocore, aiohttp, urllib3 and Python itself have them; and what to call them."""
TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
"""S3's own names; some of them come with status 400 or 409."""
NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}

log = logging.getLogger("bgray.storage")
_incidents: collections.deque[str] = collections.deque(maxlen=KEPT)
_given_up: dict[str, float] = {}  # bucket: until when


class NoAnswer(TimeoutError):
    """Remote storage gave no usable answer for RETRY_SECONDS."""


class Truncated(OSError):
    """Fewer bytes came than the file has."""


def incidents() -> list[str]:
    """What remote storage did wrong since the last call, a line each, oldest first: of this process
    only, and no more than the last 100. Each is logged as a warning too when it happens."""
    lines = []
    with contextlib.suppress(IndexError):  # another thread may take the last one
        while True:
            lines.append(_incidents.popleft())
    return lines


def forget() -> None:
    """What this process knows of remote storage: for the next trial of a process, whose record is
    not to have what the one before met."""
    _incidents.clear()
    _given_up.clear()


def _incident(text: str) -> None:
    _incidents.append(text)
    log.warning("%s", text)


def transient(error: BaseException) -> str | None:
    """What was seen, in a few words, when it is worth trying again; None for an error that stays:
    no such file or bucket, no permission, no credentials."""
    if isinstance(error, NoAnswer):
        return None
    if isinstance(error, Truncated):
        return str(error)
    causes = [error]  # s3fs turns S3's answers into OSErrors and keeps the answer as their cause
    while (cause := causes[-1].__cause__) is not None and len(causes) < 10:
        causes.append(cause)
    for cause in causes:
        if isinstance(answer := getattr(cause, "response", None), dict):
            return _of_answer(answer)
    for cause in causes:
        if "CERTIFICATE_VERIFY_FAILED" in str(cause):
            return None
    for cause in causes:
        for base in type(cause).__mro__:
            if base.__name__ in TRANSIENT:
                what = TRANSIENT[base.__name__]
                if address := getattr(cause, "kwargs", {}).get("endpoint_url"):
                    what += f" ({urlsplit(address).netloc})"  # perhaps it is a wrong one
                return what
    return None


def _of_answer(answer: dict[str, Any]) -> str | None:
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status in (429, 500) or 502 <= status < 600 or code in TRANSIENT_CODES:
        return f"{status} {code}" if code and code != str(status) else f"{status}"
    return None


def tried(url: str, operation: Callable[[], T], num_bytes: int = 0) -> T:
    """What `operation` returns; it is tried again while remote storage misbehaves.

    NoAnswer when it does so for RETRY_SECONDS; every other OSError has the url as its filename.
    num_bytes: that a write moves, to tell slow storage from a large file.
    """
    if "://" not in url:
        return operation()
    began, seen, told, tries = time.monotonic(), [], False, 0
    bucket = "/".join(url.split("/", 3)[:3])
    while True:
        tries += 1
        try:
            result = operation()
        except Exception as error:
            if (what := transient(error)) is None:
                if (plain := named(error, url)) is error:
                    raise
                raise plain from error
            now = time.monotonic()
            seen.append(what)
            pause = min(PAUSE_SECONDS[1], PAUSE_SECONDS[0] * 2 ** min(tries - 1, 30))
            pause *= random.SystemRandom().uniform(0.5, 1)
            given_up = now < _given_up.get(bucket, -1.0)
            if given_up or now + pause > began + RETRY_SECONDS:
                if not given_up:
                    _given_up[bucket] = now + GIVEN_UP_SECONDS
                text = f"{_summary(seen)}; tried for {now - began:.0f} s, {_times(tries)}"
                _incident(f"{url}: {text}, and given up")
                raise NoAnswer(errno.ETIMEDOUT, text, url) from error
            if now + pause > began + WORD_AFTER_SECONDS and not told:
                told = True
                log.warning("%s: %s; trying again for up to %.0f s", url, what, RETRY_SECONDS)
            time.sleep(pause)
            continue
        took = time.monotonic() - began
        _given_up.pop(bucket, None)
        num_bytes = len(result) if isinstance(result, bytes) else num_bytes
        if seen:
            text = f"answered after {took:.1f} s and {_times(tries)}"
            _incident(f"{url}: {_summary(seen)}, {text}")
        elif took > SLOW_SECONDS + num_bytes / SLOW_BYTES_PER_SECOND:
            _incident(f"{url}: slow, answered after {took:.0f} s")
        return result


def _summary(seen: list[str]) -> str:
    return ", ".join(dict.fromkeys(seen))


def _times(tries: int) -> str:
    return "1 try" if tries == 1 else f"{tries} tries"


def named(error: Exception, url: str) -> Exception:
    """The error as an OSError with the url as its filename. s3fs's do not say what they are about;
    what S3's client alone raises (no credentials, say) is none."""
    from botocore.exceptions import BotoCoreError

    if isinstance(error, BotoCoreError):
        return OSError(errno.EIO, str(error), url)
    if not isinstance(error, OSError) or error.filename is not None:
        return error
    if error.errno is not None:
        error.filename = url
        return error
    number = NUMBERS.get(type(error), errno.EIO)
    return OSError(number, str(error), url)  # of the same class: the number decides
