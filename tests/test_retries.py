import errno
import logging

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from s3fs.errors import translate_boto_error

from bgray import retries
from bgray.retries import NoAnswer, Truncated, transient, tried

URL = "s3://bucket/run/file"


class Clock:
    """Time that only sleeping and failing operations move."""

    def __init__(self):
        self.now, self.pauses = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(retries, "time", made)
    monkeypatch.setattr(retries, "_given_up", {})
    retries.incidents()
    yield made
    retries.incidents()


def answer(status, code=""):
    """What s3fs raises for an answer of S3."""
    body = {"Error": {"Code": code or str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(body, "GetObject"))


def failing(*errors, result=b"all"):
    """An operation that raises each of the errors once."""
    left = list(errors)

    def operation():
        if left:
            raise left.pop(0)
        return result

    return operation


ADDRESS = {"endpoint_url": "http://host:9/bucket/file"}


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (answer(503, "SlowDown"), "503 SlowDown"),
        (answer(503), "503"),
        (answer(500, "InternalError"), "500 InternalError"),
        (answer(429, "TooManyRequests"), "429 TooManyRequests"),
        (answer(400, "RequestTimeout"), "400 RequestTimeout"),
        (EndpointConnectionError(**ADDRESS), "no connection (host:9)"),
        (ConnectTimeoutError(**ADDRESS), "no connection in time (host:9)"),
        (ConnectionClosedError(**ADDRESS), "connection closed (host:9)"),
        (ReadTimeoutError(**ADDRESS), "no answer in time (host:9)"),
        (ResponseStreamingError(error="x"), "answer cut short"),
        (FlexibleChecksumError(error_msg="x"), "answer damaged on the way"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "connection failed"),
        (TimeoutError(), "no answer in time"),
        (Truncated("3 of 9 bytes came"), "3 of 9 bytes came"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_may_pass_is_worth_another_try_and_named(error, what):
    assert transient(error) == what


@pytest.mark.parametrize(
    "error",
    [
        answer(404, "NoSuchKey"),
        answer(404, "NoSuchBucket"),
        answer(403, "AccessDenied"),
        answer(403),
        answer(400, "ExpiredToken"),
        answer(501, "NotImplemented"),
        NoCredentialsError(),
        SSLError(error="CERTIFICATE_VERIFY_FAILED: self-signed", **ADDRESS),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.ENOSPC, "full"),
        ValueError("no such bucket name"),
        NoAnswer(errno.ETIMEDOUT, "tried long enough", URL),
    ],
    ids=repr,
)
def test_what_stays_is_raised_at_once(error, clock):
    assert transient(error) is None
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is the point below)
        tried(URL, failing(error))
    assert clock.pauses == []
    assert retries.incidents() == []
    if isinstance(error, FileNotFoundError | PermissionError):
        assert type(caught.value) is type(error)
    if isinstance(error, OSError):
        assert caught.value.filename == URL


def test_no_credentials_become_an_os_error_with_the_url():
    with pytest.raises(OSError, match="Unable to locate credentials") as caught:
        tried(URL, failing(NoCredentialsError()))
    assert caught.value.filename == URL


def test_an_operation_is_tried_until_it_is_answered_and_one_line_says_so(clock, caplog):
    slow_down = [answer(503, "SlowDown") for _ in range(3)]
    assert tried(URL, failing(*slow_down, Truncated("1 of 3 bytes came"))) == b"all"
    waited = sum(clock.pauses)
    assert len(clock.pauses) == 4
    expected = f"{URL}: 503 SlowDown, 1 of 3 bytes came, answered after {waited:.1f} s and 5 tries"
    assert retries.incidents() == [expected]
    assert retries.incidents() == []  # taken
    assert caplog.records[-1].name == "bgray.storage"
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[-1].getMessage() == expected


def test_pauses_double_up_to_a_bound_and_differ_from_machine_to_machine(clock):
    with pytest.raises(NoAnswer):
        tried(URL, failing(*[answer(503) for _ in range(1000)]))
    for number, pause in enumerate(clock.pauses):
        longest = min(20.0, 2.0**number)
        assert longest / 2 <= pause <= longest
    late = clock.pauses[6:]
    assert len(set(late)) == len(late) > 5


def test_it_ends_within_the_bound_with_the_url_and_what_was_seen(clock):
    began = clock.now
    with pytest.raises(NoAnswer, match=r"503 SlowDown; tried for \d+ s, \d+ tries") as caught:
        tried(URL, failing(*[answer(503, "SlowDown") for _ in range(1000)]))
    assert caught.value.filename == URL
    assert retries.RETRY_SECONDS - 20 <= clock.now - began <= retries.RETRY_SECONDS
    assert retries.incidents() == [f"{URL}: {caught.value.strerror}, and given up"]


def test_requests_that_take_long_to_fail_count_too(clock):
    tries = []

    def times_out():
        tries.append(clock.now)
        clock.now += 30
        raise ReadTimeoutError(**ADDRESS)

    with pytest.raises(NoAnswer):
        tried(URL, times_out)
    assert len(tries) < 11
    assert clock.now - tries[0] <= retries.RETRY_SECONDS + 30


def test_a_bucket_that_was_given_up_is_tried_once_for_a_while_and_others_as_ever(clock):
    with pytest.raises(NoAnswer):
        tried(URL, failing(*[answer(503) for _ in range(1000)]))
    clock.pauses.clear()
    with pytest.raises(NoAnswer, match="tried for 0 s, 1 try"):
        tried("s3://bucket/other", failing(answer(503)))
    assert clock.pauses == []
    assert tried("s3://elsewhere/file", failing(answer(503))) == b"all"
    clock.now += retries.GIVEN_UP_SECONDS
    assert tried("s3://bucket/other", failing(answer(503))) == b"all"


def test_an_answer_ends_the_giving_up(clock):
    with pytest.raises(NoAnswer):
        tried(URL, failing(*[answer(503) for _ in range(1000)]))
    assert tried(URL, failing()) == b"all"
    assert tried(URL, failing(answer(503))) == b"all"


def test_a_long_wait_is_announced_once(clock, caplog):
    tried(URL, failing(*[answer(503, "SlowDown") for _ in range(12)]))
    waiting = [r.getMessage() for r in caplog.records if "trying again" in r.getMessage()]
    assert waiting == [f"{URL}: 503 SlowDown; trying again for up to 300 s"]
    assert len(retries.incidents()) == 1


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "slow"), [(0, 12, True), (0, 9, False), (50e6, 40, False)]
)
def test_an_answer_that_is_slow_for_its_size_leaves_a_line(clock, num_bytes, seconds, slow):
    def operation():
        clock.now += seconds

    tried(URL, operation, int(num_bytes))
    assert retries.incidents() == ([f"{URL}: slow, answered after 12 s"] if slow else [])


def test_local_paths_are_tried_once(clock):
    with pytest.raises(TimeoutError):
        tried("/nfs/file", failing(TimeoutError("nobody there")))
    assert clock.pauses == []


def test_no_more_than_the_last_hundred_lines_are_kept():
    for number in range(150):
        tried(f"s3://bucket/{number}", failing(answer(503)))
    lines = retries.incidents()
    assert [line.split(":")[1] for line in (lines[0], lines[-1])] == ["//bucket/50", "//bucket/149"]
    assert len(lines) == 100
