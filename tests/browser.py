"""Headless Chromium and the dashboard's server, for tests of pages."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

FLAGS = [
    "--no-sandbox",
    "--autoplay-policy=no-user-gesture-required",
    "--use-gl=angle",  # WebGL without a GPU
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]


@contextlib.contextmanager
def chromium() -> Iterator:
    """A browser; without Chromium the test is skipped, or fails where BGRAY_LAB_REQUIRED is set."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing = "needs chromium (Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("BGRAY_LAB_REQUIRED") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def dashboard(folder, **options) -> Iterator:
    """The dashboard's server over a folder, answering; options: host, port."""
    from bgray.dashboard import Server
    from bgray.watching import Watch

    server = Server(Watch(str(folder)), **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def until(page, holds: Callable[[], bool], seconds: float = 60) -> None:
    """Lets the page go on until what a test has collected of it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not so in {seconds:g} s"
        page.wait_for_timeout(10)


class Seen:
    """What a page has asked for, and what went wrong in it."""

    def __init__(self, page):
        self.urls: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._console)

    def _console(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    @property
    def hosts(self) -> set[str]:
        """Of requests over a network; data: and blob: go nowhere."""
        parts = [urlsplit(url) for url in self.urls]
        return {p.netloc for p in parts if p.scheme not in ("data", "blob")}
