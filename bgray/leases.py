"""One process at a time works on a folder, here or on S3: a lease with a heartbeat, refused while
its holder lives, taken over once it is dead."""

import contextlib
import dataclasses
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bgray import storage
from bgray.config import ConfigError
from bgray.lease_files import DIGITS, HEAD, Found, Local, Remote, Store
from bgray.records import process

NAME = "lease.json"


@dataclasses.dataclass(frozen=True)
class Pace:
    beat_seconds: float
    """Between two heartbeats."""
    dead_seconds: float
    """A lease whose heartbeat was seen to stand still for so long is dead; by the clock of the one
    who watches, because those of two machines differ."""
    poll_seconds: float
    settle_seconds: float
    """Where storage cannot refuse a write, two that write at once see after this which one came
    last."""


LOCAL, REMOTE = Pace(5.0, 30.0, 0.5, 1.0), Pace(10.0, 60.0, 2.0, 3.0)


@contextlib.contextmanager
def held(
    folder: str,
    say: Callable[[str], None] = print,
    what: str = "a command",
    pace: Pace | None = None,
    option: str = "runtime.results",
) -> "Iterator[Lease]":
    """`with held(folder, say, what="sweep kernels") as lease:` this process alone has the folder.

    ConfigError while another process has it, at once when that one is on this machine, otherwise
    as soon as its heartbeat moves. OSError where the lease cannot be written. Then ask
    `lease.lost()` before writing anything that must not overwrite another process's.
    option: what names the folder, for the error.
    """
    pace = pace or (REMOTE if storage.is_remote(folder) else LOCAL)
    lease = Lease(folder, say, what, pace, option)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def forget_dead(folder: str) -> None:
    """Remove the lease of a process of this machine that was killed; any other stays."""
    url = storage.join(folder, NAME)
    pace = REMOTE if storage.is_remote(folder) else LOCAL
    store: Store = (Remote if storage.is_remote(folder) else Local)(url, pace.settle_seconds)
    with contextlib.suppress(OSError):  # it hinders nobody
        found = store.read()
        holder = _parsed(found.raw) if found else {}
        if "token" in holder and _fate(holder)[0] == "gone":
            store.remove(holder["token"])


def holder(raw: bytes) -> tuple[str, dict[str, Any]]:
    """(alive, gone or unknown; who) of a lease.json, for those who only watch. Unknown is what is
    at work on another machine: it lives while the file changes, which is at least every
    `Pace.dead_seconds`."""
    facts = _parsed(raw)
    return _fate(facts)[0], facts


class Lease:
    """`held` makes and ends it."""

    def __init__(self, folder: str, say: Callable[[str], None], what: str, pace: Pace, option: str):
        self._folder, self._say, self._pace, self._option = folder, say, pace, option
        self._token = uuid.uuid4().hex
        self._facts = {
            "token": self._token,
            "what": what,
            **here(),
            **process(),
            "command": " ".join(sys.orig_argv)[:500],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        url, settle = storage.join(folder, NAME), pace.settle_seconds
        remote = storage.is_remote(folder)
        self._store: Store = Remote(url, settle) if remote else Local(url, settle)
        # Asking S3 costs a request, and the heartbeat asks anyway; but not while the machine slept.
        self._fresh_seconds = pace.dead_seconds / 2 if remote else 0.0
        self._looked, self._lost = _clock(), None
        self._beats, self._told = 0, False
        self._outrun_since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="bgray-lease", daemon=True)

    def acquire(self) -> None:
        """Refused, waited for or taken over, as `held` says."""
        watched, since = None, 0.0
        while True:
            found = self._store.read()
            if found is None:
                if self._put(None):
                    break
                continue
            holder = _parsed(found.raw)
            fate, why = _fate(holder)
            if fate == "alive":
                raise self._refusal(holder)
            if watched is None or _parsed(watched.raw).get("token") != holder.get("token"):
                watched, since = found, time.monotonic()
                if fate == "unknown":
                    self._say(
                        f"{self._folder}: {_who(holder)} held it last and may still do so ({why}); "
                        f"watching its heartbeat for up to {self._pace.dead_seconds:.0f} s"
                    )
            elif found.raw != watched.raw:
                raise self._refusal(holder)
            dead = time.monotonic() - since >= self._pace.dead_seconds
            if (fate == "gone" or dead) and self._put(found):
                how = f"has shown no heartbeat for {self._pace.dead_seconds:.0f} s"
                how = "has ended without giving it back" if fate == "gone" else how
                self._say(f"{self._folder}: {_who(holder)} {how}; taken over")
                break
            if fate == "unknown":
                time.sleep(self._pace.poll_seconds)
        self._looked = _clock()
        self._thread.start()

    def lost(self) -> str | None:
        """Who has this folder now, in a sentence, if it is not this process any more: it was
        suspended or cut off, and another one took it for dead. It must stop and write nothing."""
        if not self._lost and _clock() - self._looked >= self._fresh_seconds:
            self._looked = _clock()
            with contextlib.suppress(OSError):  # no answer is no news
                self._judge(self._store.glance())
        return self._lost

    def release(self) -> None:
        """Give the folder back; nothing happens in a fork of the process that has it."""
        if self._facts["pid"] != os.getpid():
            return
        self._stop.set()
        self._thread.join(timeout=15.0)
        try:
            self._store.remove(self._token)
        except OSError as error:
            self._say(f"{self._folder}: its {NAME} stays there ({_reason(error)})")

    # --- the holder

    def _keep(self) -> None:
        due = time.monotonic() + self._pace.beat_seconds
        while not self._lost and not self._stop.wait(max(0.0, due - time.monotonic())):
            due = time.monotonic() + self._pace.beat_seconds
            self._looked = _clock()
            self._beats += 1
            try:
                self._judge(self._store.beat(self._text(), self._token))
            except Exception as error:  # whatever it is: a thread that ended would look dead
                if not self._told:
                    self._told = True
                    where = storage.join(self._folder, NAME)
                    with contextlib.suppress(OSError, ValueError):  # a console that is closed
                        self._say(
                            f"cannot write the heartbeat {where} ({_reason(error)}); going on"
                        )

    def _judge(self, found: Found | None) -> None:
        if found is None:
            self._lost = (
                f"{self._folder}: its {NAME} is gone, removed by hand or by a process that took "
                "it over and has ended; this one stops and writes nothing more"
            )
        elif self._token.encode() not in found.raw:
            who = _who(_parsed(found.raw))
            self._lost = (
                f"{self._folder}: {who} has taken it over; this one stops and writes nothing more"
            )

    def _text(self) -> bytes:
        rest = json.dumps(self._facts)[1:]
        return f"{HEAD}{self._beats:>{DIGITS}}, {rest}\n".encode()

    # --- the one who asks

    def _put(self, over: Found | None) -> bool:
        if self._store.put(self._text(), over, self._token):
            return True
        # Another one was faster, which the next look shows; or it was suspended just now.
        now = time.monotonic()
        self._outrun_since = now if self._outrun_since is None else self._outrun_since
        if now - self._outrun_since > self._pace.dead_seconds:
            text = f"others are just taking its {NAME}; see which, and run the same command again"
            raise ConfigError(self._folder, [("", text)])
        time.sleep(min(0.05, self._pace.poll_seconds))
        return False

    def _refusal(self, holder: dict[str, Any]) -> ConfigError:
        what = f"has been running {holder.get('what', 'a command')}"
        since = f" since {holder['started']}" if "started" in holder else ""
        text = (
            f"{_who(holder)} {what}{since}; wait for it, stop it (Ctrl-C there), or write to "
            f"another place with --set {self._option}=FOLDER"
        )
        return ConfigError(self._folder, [("", text)])


# --- who it is


def _clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def here() -> dict[str, Any]:
    """What makes process numbers mean the same: host name, boot, and container."""
    boot = namespace = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": platform.node(), "boot": boot, "pid_namespace": namespace}


def _fate(holder: dict[str, Any]) -> tuple[str, str]:
    """("alive" | "gone" | "unknown", why nothing better is known) of the process in a lease."""
    mine = here()
    pid = holder.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return "unknown", f"its {NAME} is damaged"
    if holder.get("host") != mine["host"]:
        return "unknown", "that is another machine"
    if None in mine.values() or any(holder.get(key) != value for key, value in mine.items()):
        return "unknown", "that may be another machine or container, or from before a restart"
    for _ in range(100):
        try:
            fields = _stat(pid)
        except (FileNotFoundError, ProcessLookupError):
            return ("unknown", "its process is hidden") if _exists(pid) else ("gone", "")
        if fields[19] != holder.get("pid_started"):
            return "gone", ""  # its number was given to another
        if not _is_ending(fields):
            break
        time.sleep(0.01)  # killed, it may still be at its last write in another thread
    else:
        return "unknown", "it is just ending"
    if fields[0] in "ZX":  # ended, and its parent has not asked how
        return "gone", ""
    if fields[0] in "Tt":
        return "unknown", "it is suspended (Ctrl-Z?)"
    return "alive", ""


def _stat(pid: int) -> list[str]:
    """Of /proc/PID/stat what follows the name: the state first (man 5 proc_pid_stat)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_ending(fields: list[str]) -> bool:
    """Past its end (a zombie, or PF_EXITING among its flags) but for threads that are not yet."""
    if fields[0] in "ZX":
        return int(fields[17]) > 1
    return bool(int(fields[6]) & 0x4)


def _exists(pid: int) -> bool:
    """Also where /proc hides the processes of others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _parsed(raw: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(facts := json.loads(raw), dict):
            return facts
    return {}


def _who(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on host {holder.get('host')}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
