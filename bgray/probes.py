"""What a run costs: seconds per step without compilation and validation, share of waiting for
data, memory peaks."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

GIB = 1024**3
TARGET_STEPS = 10_000
COUNTERS = (
    "steps",
    "warm_up_steps",
    "target_seconds",
    "train_seconds",
    "data_wait_seconds",
    "warm_up_seconds",
    "other_seconds",
)
WARM_UP_STEPS = 3
"""First steps of a process: allocation, autotuning, compilation. Timed apart, and left out of the
speed; more of them where a CUDA graph is recorded."""


class Clock:
    """Adds up where a run's time goes. All counters survive a restart through `state` and
    `restore`.

    The GPU is synchronised by `read` only, so between two reads the host may run ahead of it; the
    waiting for data
    that is counted is the host's, an upper bound of what the GPU waited.
    """

    def __init__(
        self,
        device: torch.device,
        now: Callable[[], float] = time.perf_counter,
        warm_up_steps: int = WARM_UP_STEPS,
    ):
        self.device, self._now = device, now
        self.steps = 0  # timed ones
        self.warm_up_steps = 0
        self.target_seconds: float | None = None  # of the first 10,000 steps, once they are done
        self.train_seconds = 0.0  # of timed steps, data wait included
        self.data_wait_seconds = 0.0
        self.warm_up_seconds = 0.0
        self.other_seconds = 0.0  # validation, checkpoints, clips
        self._warm_up_left = warm_up_steps
        self._mark = now()
        self._steps_since = 0
        self._wait_since = 0.0

    def start(self) -> None:
        """The loop is about to begin."""
        self._mark = self._now()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for the next batch."""
        began = self._now()
        yield
        self._wait_since += self._now() - began

    def step(self) -> None:
        """After each optimizer step."""
        self._steps_since += 1
        if self._warm_up_left:
            self._warm_up_left -= 1
            self.warm_up_steps += 1
            self._synchronize()
            self.warm_up_seconds += self._lap()
            self._steps_since, self._wait_since = 0, 0.0

    def read(self) -> None:
        """Synchronise and add what passed since the last read; call on reporting steps."""
        if self._steps_since:
            self._synchronize()
            self.train_seconds += self._lap()
            self.data_wait_seconds += self._wait_since
            self.steps += self._steps_since
            self._steps_since, self._wait_since = 0, 0.0
            if self.target_seconds is None and self.steps + self.warm_up_steps >= TARGET_STEPS:
                self.target_seconds = TARGET_STEPS * self.train_seconds / self.steps

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around validation, clips and checkpoints: their time is not training time."""
        self.read()
        self._lap()
        yield
        self._synchronize()
        self.other_seconds += self._lap()

    def _lap(self) -> float:
        now = self._now()
        passed, self._mark = now - self._mark, now
        return passed

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def summary(self) -> dict[str, Any]:
        """Numbers for timing.jsonl. time_to_10k_steps is in seconds: measured over the first 10,000
        steps (a warm-up step counts as a mean one) and then kept; until then extrapolated from the
        mean step, as `time_to_10k_steps_extrapolated` says."""
        per_step = self.train_seconds / self.steps if self.steps else None
        waited = self.data_wait_seconds / self.train_seconds if self.train_seconds else None
        target = self.target_seconds or (per_step and per_step * TARGET_STEPS)
        return {
            "steps_per_second": round(1 / per_step, 4) if per_step else None,
            "data_wait_share": None if waited is None else round(waited, 4),
            "train_seconds": round(self.train_seconds, 3),
            "warm_up_seconds": round(self.warm_up_seconds, 3),
            "other_seconds": round(self.other_seconds, 3),
            "time_to_10k_steps": round(target, 1) if target else None,
            "time_to_10k_steps_extrapolated": self.target_seconds is None,
            **memory(self.device),
        }

    def state(self) -> dict[str, float | None]:
        self.read()
        return {name: getattr(self, name) for name in COUNTERS}

    def restore(self, state: dict[str, float | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def out_of_memory(
    device: torch.device, error: BaseException, limit_gib: float | None
) -> dict[str, float | None]:
    """How much it was, for run.json: peaks up to the error, the allocation that failed (None where
    its text does not say), and the limit under which it ran (None: the whole GPU). All in GiB."""
    found = re.search(r"Tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)", str(error))
    unit = {"bytes": 1 / GIB, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}
    seen = memory(device)
    return {
        "asked_gib": round(float(found[1]) * unit[found[2]], 3) if found else None,
        "peak_gib": seen["vram_peak_gib"],
        "reserved_gib": seen["vram_reserved_gib"],
        "limit_gib": None if limit_gib is None else round(limit_gib, 3),
    }


def reset_memory(device: torch.device) -> None:
    """Forget earlier peaks of this process (a warm Tune worker has run other trials before)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux: 5 resets the peak of resident memory
        Path("/proc/self/clear_refs").write_text("5")


def _rss_peak_bytes() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # Elsewhere the peak of the whole process life: KiB, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def memory(device: torch.device) -> dict[str, float | None]:
    """Peaks of this process in GiB: VRAM allocated by tensors and reserved by the allocator, and
    resident memory."""
    facts: dict[str, float | None] = {"vram_peak_gib": None, "vram_reserved_gib": None}
    if device.type == "cuda":
        facts["vram_peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 3)
        facts["vram_reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
    return {**facts, "rss_peak_gib": round(_rss_peak_bytes() / GIB, 3)}
