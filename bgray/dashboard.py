"""Dashboard: a live page over a sweep, or a folder of sweeps, with its table, sound and curves.

python -m bgray.dashboard RESULTS [--host 127.0.0.1] [--port 8050] [--no-browser]
"""

import argparse
import contextlib
import errno
import hmac
import ipaddress
import logging
import secrets
import socket
import sys
import threading
import webbrowser
from typing import Any
from urllib.parse import urlencode, urlsplit

from bgray.problems import ConfigError
from bgray.train import errors_in_one_line

PORTS_TRIED = 20
TOKEN_BYTES = 24


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.dashboard", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", metavar="RESULTS", help="a sweep's folder, or one of sweeps")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="what to listen on; other than this machine itself (127.0.0.1, the default) a token "
        "is asked for",
    )
    parser.add_argument("--port", type=int, default=8050, help="the next free one from here on")
    parser.add_argument("--no-browser", action="store_true", help="open none")
    args = parser.parse_args(argv)
    with errors_in_one_line(resumes=False):
        if not 0 <= args.port < 65536:
            text = f"must be between 0 and 65535, got {args.port}"
            raise ConfigError("python -m bgray.dashboard", [("--port", text)])
        from bgray.watching import Watch  # --help need not wait for it

        server = Server(Watch(args.results), args.host, args.port)
        if server.port != args.port and args.port:
            print(f"port {args.port} is taken, this is {server.port}")
        print(f"{args.results}: {server.address}", flush=True)
        for line in server.advice():
            print(line, flush=True)
        print("Ctrl-C ends it.", flush=True)
        if not args.no_browser and sys.stdout.isatty():
            with contextlib.suppress(webbrowser.Error):
                webbrowser.open(server.address)
        server.run()
        print("\nended")


class Server:
    """The page's server: bound when it is made, answering while `run` runs.

    ConfigError where the address cannot be had.
    """

    def __init__(self, watch: Any, host: str = "127.0.0.1", port: int = 0):
        from werkzeug.serving import make_server

        from bgray.page import build

        # Of every request it would print a line, and there is one every two seconds.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.host, self._watch = host, watch
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.token = None if _is_loopback(self._socket) else secrets.token_urlsafe(TOKEN_BYTES)
        app = build(watch)
        guard(app, self.token, self.port)
        self._server = make_server(
            host, self.port, app.server, threaded=True, fd=self._socket.fileno()
        )

    @property
    def address(self) -> str:
        """For a browser; with the token where one is asked for."""
        host = self.host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        host = f"[{host}]" if ":" in host else host
        query = f"?{urlencode({'token': self.token})}" if self.token else ""
        return f"http://{host}:{self.port}/{query}"

    def advice(self) -> list[str]:
        """How to see it from elsewhere."""
        name = socket.gethostname()
        near = self.host if self.token is None else "127.0.0.1"
        near = f"[{near}]" if ":" in near else near
        tunnel = f"ssh -L {self.port}:{near}:{self.port} {name}"
        if self.token is None:
            text = f"from another machine: {tunnel}, then http://localhost:{self.port}/ there"
            return [text]
        return [
            "whoever has this address sees the results; it is not encrypted on its way. Safer: "
            f"leave out --host, and {tunnel}"
        ]

    def run(self) -> None:
        """Until Ctrl-C, or `stop` from another thread."""
        # The first look is the longest: begun here, it is over when the browser asks.
        threading.Thread(target=self._watch.warm, daemon=True).start()
        self._server.serve_forever()

    def stop(self) -> None:
        self._server.shutdown()


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens on `port`, or on the next free one."""
    last = min(port + PORTS_TRIED, 65536) if port else 1
    for one in range(port, last):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, one), family=family, backlog=128)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                text = f"cannot listen on {host} port {one}: {error.strerror or error}"
                raise ConfigError("python -m bgray.dashboard", [("--host", text)]) from None
    text = f"{port} to {last - 1} are all taken; give another one, or 0 for any"
    raise ConfigError("python -m bgray.dashboard", [("--port", text)])


def _is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


# --- who may see it


def guard(app: Any, token: str | None, port: int) -> None:
    """Every request to a Dash app, its listening strip's and its assets' too, goes through this.

    Without a token only this machine's own names are answered: otherwise any page in the browser
    could point its own name at 127.0.0.1 and read the results (DNS rebinding). The port may be
    another one, as at the near end of a tunnel.
    """
    import flask

    cookie = f"bgray-{port}"  # cookies know no ports: two dashboards on one host need two names
    policy = _policy(app)

    def admit() -> Any:
        request = flask.request
        if token is None:
            if not _is_here(request.host):
                return _plain("not a name of this machine; open http://localhost\n", 403)
        else:
            given = request.args.get("token")
            if given is not None and _same(given, token) and request.method == "GET":
                rest = [(k, v) for k, v in request.args.items(multi=True) if k != "token"]
                # The address that stays on the screen, and in the history, has no token in it.
                place = request.path + (f"?{urlencode(rest)}" if rest else "")
                answer = flask.redirect("/" + place.lstrip("/\\"), 303)
                answer.set_cookie(cookie, token, httponly=True, samesite="Strict", path="/")
                return answer
            if not _same(request.cookies.get(cookie, ""), token):
                text = "open the address that the dashboard's command has printed, ?token= "
                return _plain(text + "and all; a new start has a new one\n", 401)
        site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
        if request.method not in ("GET", "HEAD") and (
            site not in (None, "same-origin", "none")
            or (origin is not None and urlsplit(origin).netloc != request.host)
        ):
            return _plain("only this server's own page may ask for that\n", 403)
        return None

    def harden(response: Any) -> Any:
        headers = response.headers
        headers["Content-Security-Policy"] = policy
        headers["X-Content-Type-Options"] = "nosniff"
        headers["X-Frame-Options"] = "DENY"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
        if token is not None and "public" in headers.get("Cache-Control", ""):
            headers["Cache-Control"] = headers["Cache-Control"].replace("public", "private")
        headers.setdefault("Cache-Control", "no-store")
        return response

    # First of all: what others have registered must not be asked before this.
    app.server.before_request_funcs.setdefault(None, []).insert(0, admit)
    app.server.after_request(harden)


def _policy(app: Any) -> str:
    """Content-Security-Policy: nothing from, and nothing to, another host."""
    # 'unsafe-eval': plotly.js draws curves of many points and parallel coordinates by WebGL through
    # regl, which compiles its draw calls with `new Function`; without it their place stays empty.
    # Inline scripts are Dash's own few, by their hashes. Inline styles: plotly.js and Dash's
    # components set style attributes and add style elements, and there is no hash for an attribute
    # that changes. data: and blob: images are figures on their way to a download.
    script = " ".join(["'self'", "'unsafe-eval'", *app.csp_hashes()])
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {script}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _is_here(host: str) -> bool:
    """Whether a Host header, such as `[::1]:8050`, names this machine: as localhost, or by an
    address, which no other name can be made to point at."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _plain(text: str, status: int) -> Any:
    import flask

    return flask.Response(text, status, mimetype="text/plain")


if __name__ == "__main__":
    from bgray.dashboard import main

    main()
