"""Whether another process of this machine is at a run now."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

PROC = "/proc"
"""Where Linux tells of its processes; other systems have none."""


def process() -> dict[str, Any]:
    """This process, such that another one with its number later is not taken for it."""
    return {"pid": os.getpid(), "pid_started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks since boot; None: there is none,
    or nothing that would tell."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"{PROC}/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # dead, but nobody has asked how
    return None


def alive(info: dict[str, Any] | None) -> int | None:
    """The number of another process of this machine that is at this run now, or None."""
    if not info or info.get("state") != "running" or not info.get("attempts"):
        return None
    last = info["attempts"][-1]
    pid = last.get("pid")
    if not pid or pid == os.getpid() or last.get("host") != platform.node():
        return None
    if not Path(f"{PROC}/self/stat").exists():
        return pid if _answers(pid) else None
    started = last.get("pid_started")
    return pid if started is not None and _started(pid) == started else None


def _answers(pid: int) -> bool:
    """Whether there is a process of this number, whoever it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
