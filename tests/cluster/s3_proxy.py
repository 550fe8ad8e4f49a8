"""A proxy on this machine in front of an S3 server, which misbehaves when it is told to."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}

Asked = Callable[[str, str], bool]
"""Whether a request (its method, its path with the query) is meant."""


def everything(method: str, path: str) -> bool:
    return True


class Fault:
    """What goes wrong, with which requests, and until when.

    kind: "503"; "slow": the answer comes after `delay` seconds; "cut": half of the body, then the
      connection ends; "short": half of the body, and a Content-Length that agrees with it;
      "closed": the connection ends without an answer; "refused": nobody listens for `seconds`.
    begins: from the first such request on (which is among those that suffer, if `hits` it).
    hits: these requests suffer, for `seconds` from then, or so many (`times`).
    """

    def __init__(
        self,
        kind: str,
        *,
        begins: Asked = everything,
        hits: Asked = everything,
        seconds: float = float("inf"),
        times: float = float("inf"),
        delay: float = 0.0,
    ):
        self.kind, self.delay = kind, delay
        self.suffered: list[str] = []
        self._begins, self._hits, self.seconds, self._times = begins, hits, seconds, times
        self._began: float | None = None
        self._lock = threading.Lock()

    def now(self, method: str, path: str) -> bool:
        """Whether this request suffers; counts it."""
        with self._lock:
            if self._began is None and self._begins(method, path):
                self._began = time.monotonic()
            if self._began is None or time.monotonic() - self._began > self.seconds:
                return False
            if len(self.suffered) >= self._times or not self._hits(method, path):
                return False
            if self.kind in ("cut", "short") and method != "GET":
                return False
            self.suffered.append(f"{method} {path}")
            return True


class Proxy:
    """Forwards every request to `target` (http://host:port). `url` is where it listens."""

    def __init__(self, target: str):
        self._target = urlsplit(target)
        self.fault: Fault | None = None
        self.requests: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                proxy._connections.add(self.connection)

            def finish(self) -> None:
                proxy._connections.discard(self.connection)
                with contextlib.suppress(OSError):
                    super().finish()

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client has had enough
                    super().handle_one_request()

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _any(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self._make = lambda port: Server(("127.0.0.1", port), Handler)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._server = self._make(0)
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "Proxy":
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stop_listening()

    def _listen(self) -> None:
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def _stop_listening(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _go_away(self, seconds: float) -> None:
        if not self._lock.acquire(blocking=False):
            return  # away already
        try:
            self._stop_listening()
            time.sleep(seconds)
            self._server = self._make(self._port)
            self._listen()
        finally:
            self._lock.release()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        method, path = handler.command, handler.path
        self.requests.append(f"{method} {path}")
        fault = self.fault
        kind = fault.kind if fault is not None and fault.now(method, path) else ""
        if kind == "refused":
            assert fault is not None
            threading.Thread(target=self._go_away, args=(fault.seconds,)).start()
        if kind in ("refused", "closed"):
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if kind == "503":
            status, headers, answer = 503, [("Content-Type", "application/xml")], SLOW_DOWN
            length = len(answer)
        else:
            status, headers, answer, length = self._forward(handler, body)
        if kind == "slow":
            assert fault is not None
            time.sleep(fault.delay)
        sent = answer
        if kind in ("cut", "short"):
            sent = answer[: len(answer) // 2]
            length = len(sent) if kind == "short" else length
        handler.send_response_only(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if method != "HEAD":
            handler.wfile.write(sent)
        if kind == "cut":
            handler.close_connection = True

    def _forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes, int]:
        """Status, headers, body, and the length that was announced (of a HEAD, the file's)."""
        connection = http.client.HTTPConnection(
            self._target.hostname or "", self._target.port, timeout=60
        )
        with contextlib.closing(connection):
            headers = {k: v for k, v in handler.headers.items() if k.lower() not in HOP_BY_HOP}
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
            length = int(response.getheader("Content-Length") or len(content))
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP]
            return response.status, kept, content, length
