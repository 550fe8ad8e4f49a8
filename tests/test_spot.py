"""The spot notice, from a metadata service that this test plays."""

import contextlib
import datetime
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from bgray import spot


class Service(BaseHTTPRequestHandler):
    """IMDSv2 as EC2 documents it; `answer` is what the spot question gets, None: 404."""

    answer: "str | None" = None
    tokens: "list[str]" = []  # noqa: RUF012
    seen: "list[str]" = []  # noqa: RUF012

    def do_PUT(self):
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600"
        self.tokens.append(f"token-{len(self.tokens)}")
        self._reply(200, self.tokens[-1])

    def do_GET(self):
        self.seen.append(self.path)
        if self.headers["X-aws-ec2-metadata-token"] not in self.tokens[-1:]:
            return self._reply(401, "")
        self._reply(404 if self.answer is None else 200, self.answer or "")

    def _reply(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    Service.answer, Service.tokens, Service.seen = None, [], []
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def notice(seconds, action="terminate"):
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return json.dumps({"action": action, "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_without_a_notice_there_is_none_and_one_token_serves_all_questions(service):
    metadata = spot.Metadata(service)
    assert [metadata.notice() for _ in range(3)] == [None] * 3
    assert Service.tokens == ["token-0"]
    assert set(Service.seen) == {"/latest/meta-data/spot/instance-action"}


def test_a_notice_says_when_the_machine_goes(service):
    told = time.time()
    Service.answer = notice(120)
    assert spot.Metadata(service).notice() == pytest.approx(told + 120, abs=2)


def test_a_token_that_ran_out_is_replaced(service):
    metadata = spot.Metadata(service)
    metadata.notice()
    Service.tokens.append("of another day")
    assert metadata.notice() is None
    assert len(Service.tokens) == 3


def test_the_node_is_drained_with_what_is_left_of_the_notice(service, monkeypatch, capsys):
    asked = []

    def drain(seconds):
        asked.append(seconds)
        if len(asked) == 1:
            raise RuntimeError("Ray is not up yet")
        return "abc"

    monkeypatch.setattr(spot, "drain", drain)
    Service.answer = notice(60)
    spot.watch(0.05, service)
    assert len(asked) == 2  # tried again after the first one failed
    assert all(45 <= seconds <= 51 for seconds in asked)
    assert "drains" in capsys.readouterr().out


def test_a_service_that_does_not_answer_is_asked_on_and_said_once(monkeypatch, capsys):
    class Silent:
        asked = 0

        def __init__(self, base):
            pass

        def notice(self):
            Silent.asked += 1
            if Silent.asked < 5:
                raise OSError("no route")
            return time.time() + 30

    monkeypatch.setattr(spot, "Metadata", Silent)
    monkeypatch.setattr(spot, "drain", lambda seconds: "abc")
    spot.watch(0.01)
    assert capsys.readouterr().out.count("no answer") == 1


def test_a_second_watcher_of_one_machine_leaves_at_once(monkeypatch, tmp_path, capsys):
    import fcntl
    import os

    monkeypatch.setenv("HOME", str(tmp_path))
    handle = os.open(tmp_path / spot.LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with contextlib.closing(os.fdopen(handle)):
        spot.main([])
    assert "already" in capsys.readouterr().out
