"""How a run's start went: in a new process or a warm one, which of its parts took how long."""

import time
from collections.abc import Callable
from typing import Any


class Start:
    """Of one try of a run: `mark` after each part of the way to its first step.

    warm: whether its process has trained another run before. why_new: why the process of the trial
    before was not used again; empty where it was, or where there was none. began: when it began, in
    seconds since 1970; None: now.
    """

    def __init__(
        self,
        *,
        warm: bool = False,
        why_new: str = "",
        began: float | None = None,
        now: Callable[[], float] = time.time,
    ):
        self.warm, self.why_new = warm, why_new
        self._now = now
        self._began = self._last = now() if began is None else began
        self._parts: dict[str, float] = {}
        self._first_step: float | None = None

    def mark(self, part: str) -> None:
        """What came since the last mark was `part`. Nothing counts once the first step was done."""
        if "first_step" not in self._parts:
            now = self._now()
            self._parts[part] = self._parts.get(part, 0.0) + now - self._last
            self._last = now

    def first_batch(self) -> None:
        """The first step has its batch and begins."""
        if self._first_step is None:
            self.mark("first_batch")
            self._first_step = self._last

    def record(self) -> dict[str, Any]:
        """For the attempt in run.json: seconds of each part in order, and when the process was at
        the run, and at its first step, in seconds since 1970."""
        parts = {part: round(seconds, 4) for part, seconds in self._parts.items()}
        facts: dict[str, Any] = {"warm": self.warm, "start_seconds": parts}
        facts |= {"entered_at": round(self._began, 3)}
        if self._first_step is not None:
            facts["first_step_at"] = round(self._first_step, 3)
        return {**facts, **({"why_new": self.why_new} if self.why_new else {})}
