"""Fixtures of the cluster's tests: a lab of hosts, or the reason why there is none."""

import os

import pytest

from .lab import Lab, missing


def need_lab() -> None:
    """Skips the test where this machine cannot have a `Lab`; fails it where BGRAY_LAB_REQUIRED."""
    lacks = missing()
    if lacks and os.environ.get("BGRAY_LAB_REQUIRED"):
        pytest.fail(f"hosts made of namespaces need {', '.join(lacks)}")
    if lacks:
        pytest.skip(f"hosts made of namespaces need {', '.join(lacks)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test in a lab says what its hosts said."""
    report = yield
    if report.failed and call.when != "teardown":
        for lab in (v for v in getattr(item, "funcargs", {}).values() if isinstance(v, Lab)):
            report.sections.append(("hosts", lab.logs()))
    return report


@pytest.fixture
def lab(tmp_path):
    """A `Lab` without hosts."""
    need_lab()
    with Lab(tmp_path / "lab") as made:
        yield made
