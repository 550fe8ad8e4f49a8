"""Candidates of a comparison, each in a process of its own, that work in turn; and the CPU time of
such a process with all that it has started."""

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bgray.config import ConfigError

TICKS = os.sysconf("SC_CLK_TCK")
PROBES = 6
QUIET_SHARE = 0.15
"""Of a core: what Ray's daemons use while nothing is asked of them stays below it."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A candidate's side: it answers once when it is ready, then once to each order."""

    orders: Any
    answers: Any

    def next(self) -> Any:
        """Waits for an order; None: there is nothing more to do."""
        return self.orders.get()

    def answer(self, found: Any) -> None:
        self.answers.put(("found", found))


class Candidate:
    """`work(link, *args)` in a fresh process, as a context manager.

    where: the command, for errors: what `work` raises is ConfigError here, in one line.
    """

    def __init__(self, where: str, name: str, work: Callable[..., None], *args: Any):
        self.name, self._where = name, where
        spawn = multiprocessing.get_context("spawn")
        self._link = Link(spawn.Queue(), spawn.Queue())
        self._process = spawn.Process(target=_work, args=(work, self._link, args), name=name)
        self.ready: Any = None
        """Its first answer."""
        self._tree = Tree(0)

    def __enter__(self) -> "Candidate":
        self._process.start()
        self._tree = Tree(self._process.pid or 0)
        try:
            self.ready = self._answer()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError, OSError):
            self._link.orders.put(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(10)
            self._process.kill()

    def turn(self, order: Any) -> Any:
        """What it answers to `order` (not None)."""
        self._link.orders.put(order)
        return self._answer()

    def _answer(self) -> Any:
        while True:
            try:
                kind, found = self._link.answers.get(timeout=0.5)
            except queue.Empty:
                self._tree.seconds()
                if self._process.is_alive():
                    continue
                text = f"its process ended with code {self._process.exitcode}"
                raise ConfigError(self._where, [(self.name, text)]) from None
            if kind == "error":
                raise ConfigError(self._where, [(self.name, found)])
            return found

    def cpu_seconds(self) -> float:
        """User and system time so far of its process and of all that it has started."""
        return self._tree.seconds()

    def quiet(self, *, least: float = 0.3, most: float = 120.0) -> float:
        """Waits until it rests, at least `least` seconds: what it was asked for and what it makes
        ahead is done then. Returns `cpu_seconds`."""
        deadline, before = time.monotonic() + most, self.cpu_seconds()
        while True:
            busy = 0
            for _ in range(PROBES):
                time.sleep(least / PROBES)
                # On a busy machine one that has work may get no CPU for it.
                busy += self._tree.runnable()
            now = self.cpu_seconds()
            resting = now - before < QUIET_SHARE * least and busy <= PROBES // 2
            if resting or time.monotonic() > deadline:
                return now
            before = now


def _work(work: Callable[..., None], link: Link, args: Sequence[Any]) -> None:
    try:
        work(link, *args)
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        if os.environ.get("BGRAY_TRACEBACK"):
            raise
        first = (str(error).strip() or "no more is known").partition("\n")[0]
        link.answers.put(("error", f"{type(error).__name__}: {first}"))


class Tree:
    """A process with all that it has started, of this machine. Linux only."""

    def __init__(self, root: int):
        self._root = root
        self._seen: dict[tuple[int, str], float] = {}  # by number and time of start

    def seconds(self) -> float:
        """User and system time so far. Of processes that have ended, either as their parents have
        it, or (Ray's do not wait for theirs) as it was when this was last asked."""
        there = self._there()
        self._seen |= {key: own for key, (own, _, _) in there.items()}
        with_reaped = sum(own + reaped for own, reaped, _ in there.values())
        return max(with_reaped, sum(self._seen.values()))

    def runnable(self) -> bool:
        """Whether one of its threads works, or would if there were a CPU for it."""
        for pid, _ in self._there():
            for task in Path(f"/proc/{pid}/task").glob("*/stat"):
                with contextlib.suppress(OSError):
                    if task.read_text().rpartition(")")[2].split()[0] == "R":
                        return True
        return False

    def _there(self) -> dict[tuple[int, str], tuple[float, float, int]]:
        """Of those alive: seconds of their own, of children they have waited for, and parent."""
        every: dict[tuple[int, str], tuple[float, float, int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    own, reaped = (sum(map(int, fields[i : i + 2])) / TICKS for i in (11, 13))
                    every[int(entry.name), fields[19]] = (own, reaped, int(fields[1]))
        # Once seen, it belongs here even when its parent has gone.
        found = {key for key in every if key[0] == self._root or key in self._seen}
        new = found
        while new:
            parents = {pid for pid, _ in new}
            new = {key for key, (_, _, parent) in every.items() if parent in parents} - found
            found = found | new
        return {key: every[key] for key in found}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median of the rounds, with the least and the most of them."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "rounds": list(values),
    }


def apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the rounds of two candidates do not overlap: only then is one of them the faster."""
    return max(a) < min(b) or max(b) < min(a)
