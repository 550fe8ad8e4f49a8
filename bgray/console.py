"""The console: one live table of runs on a terminal, one quiet line per evaluation when piped."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from bgray import storage
from bgray.records import ENDED, TIMING, read_info

MARKS = {
    "waiting": "[dim]waiting[/]",
    "running": "[cyan]running[/]",
    "finished": "[green]finished[/]",
    "stopped": "[yellow]stopped[/]",
    "interrupted": "[yellow]interrupted[/]",
    "diverged": "[red]diverged[/]",
    "out_of_memory": "[red]out of memory[/]",
    "failed": "[red]failed[/]",
}


@dataclass
class Row:
    """One run as the table shows it; refreshed from its folder, the same whoever trains it and
    where."""

    id: str
    label: str
    """What differs from the base."""
    url: str
    steps: int
    info: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return self.info.get("state", "waiting")

    def refresh(self) -> None:
        self.info = read_info(self.url) or {}
        self.timing = self.info.get("timing") or {}
        if self.state == "running" and not storage.is_remote(self.url):
            self.timing = _last_line(Path(self.url, TIMING)) or self.timing

    @property
    def step(self) -> int:
        return max(
            self.info.get("step") or 0,
            self.timing.get("step") or 0 if self.state == "running" else 0,
        )

    @property
    def eta_seconds(self) -> float | None:
        speed = self.timing.get("steps_per_second")
        return (self.steps - self.step) / speed if speed and self.state == "running" else None


def _last_line(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, json.JSONDecodeError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().splitlines()
        return json.loads(lines[-1]) if lines else None
    return None


class Board:
    """Follows runs while they go and prints the closing table. `metric` is what they are compared
    by."""

    def __init__(self, title: str, rows: list[Row], metric: str, console: Console | None = None):
        self.title, self.rows, self.metric = title, rows, metric
        self.console = console or Console(
            width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty()
        )
        self._said: dict[str, tuple[str, Any]] = {}
        self._warned: set[tuple[str, str]] = set()
        self._chosen: set[str] = set()
        self._began = time.monotonic()

    @contextlib.contextmanager
    def live(self, seconds: float = 1.0) -> Iterator[None]:
        """Refresh in a thread until the block ends."""
        done = threading.Event()
        for row in self.rows:  # what was there before is not news
            row.refresh()
            self._said[row.id] = (row.state, row.info.get("metrics", {}).get("step"))
            self._warned |= {(row.id, text) for text in row.info.get("warnings") or ()}
        if any(storage.is_remote(row.url) for row in self.rows):
            seconds = max(seconds, 10.0)
        with contextlib.ExitStack() as stack:
            live = None
            if self.console.is_terminal:
                live = stack.enter_context(
                    Live(self.table(), console=self.console, refresh_per_second=4)
                )

            def follow() -> None:
                while not done.wait(seconds):
                    self._tick(live)

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                self._tick(live)

    def _tick(self, live: Live | None) -> None:
        for row in self.rows:
            if storage.is_remote(row.url) and row.state in ENDED and row.step >= row.steps:
                continue  # each look costs requests
            with contextlib.suppress(
                OSError, ValueError
            ):  # storage may be away for a moment; the next look will do
                row.refresh()
        self._say_choices()
        self._say_warnings()
        if live is not None:
            live.update(self.table())
            return
        for row in self.rows:
            news = (row.state, row.info.get("metrics", {}).get("step"))
            if row.info and self._said.get(row.id) != news:
                self._said[row.id] = news
                self.console.print(self.line(row), highlight=False, markup=False)

    def _say_choices(self) -> None:
        """What runs chose by themselves to be fast, each once: how to say otherwise, and why."""
        for row in self.rows:
            for text in (row.info.get("choices") or {}).get("reasons", ()):
                if text not in self._chosen:
                    self._chosen.add(text)
                    self.console.print(
                        f"chosen: {text}", style="dim", highlight=False, markup=False
                    )

    def _say_warnings(self) -> None:
        """Those that have come into run.json; a trial's own process has no console."""
        for row in self.rows:
            for text in row.info.get("warnings") or ():
                if (row.id, text) not in self._warned:
                    self._warned.add((row.id, text))
                    self.console.print(
                        f"{row.label}: {text}", style="yellow", highlight=False, markup=False
                    )

    def line(self, row: Row) -> str:
        """`[ 41 s] 3f2a... kernels=[7]: step 200/400, val_stft 1.23, 14.1 it/s, running`"""
        metrics = row.info.get("metrics", {})
        parts = [f"step {row.step}/{row.steps}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items() if name != "step"]
        if speed := row.timing.get("steps_per_second"):
            parts.append(f"{speed:.3g} it/s")
        reason = f" ({row.info['reason']})" if row.info.get("reason") else ""
        clock = f"[{time.monotonic() - self._began:4.0f} s]"
        return f"{clock} {row.id} {row.label}: {', '.join(parts)}, {row.state}{reason}"

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left", header_style="bold", expand=False)
        for name in ("id", "what differs"):
            table.add_column(name, overflow="fold")
        for name in (
            "step",
            "it/s",
            "ETA",
            self.metric,
            "at",
            "VRAM GiB",
            "data wait",
            "10k steps",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state")
        for row in self.rows:
            timing, metrics = row.timing, row.info.get("metrics", {})
            vram = timing.get("vram_peak_gib")
            table.add_row(
                row.id,
                escape(row.label),
                f"{row.step}/{row.steps}",
                _number(timing.get("steps_per_second"), ".3g"),
                duration(row.eta_seconds),
                _number(metrics.get(self.metric), ".4f"),
                str(metrics.get("step", "-")),
                _number(vram, ".2f") if vram is not None else "CPU",
                _number(timing.get("data_wait_share"), ".0%"),
                time_to_10k(timing),
                MARKS.get(row.state, row.state),
            )
        return table


@contextlib.contextmanager
def bar(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that moves a progress bar; nothing is drawn into a pipe."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def time_to_10k(timing: dict[str, Any]) -> str:
    """`29 min`, or `~29 min` where it was extrapolated; of a run that shared its GPU, `(29 min)`,
    which is no figure to compare."""
    seconds = timing.get("time_to_10k_steps")
    if seconds is None:
        return "-"
    text = ("~" if timing.get("time_to_10k_steps_extrapolated") else "") + duration(seconds)
    return f"({text})" if timing.get("packed") else text


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 41 s, 29 min, 3.5 h, 6 days."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
