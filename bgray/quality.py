"""What quality costs: each variant's difference to the baseline against GPU memory or time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from bgray import cells
from bgray.drawing import (
    INK,
    blank,
    bulk,
    escaped,
    figure,
    note,
    padded,
    shortened,
    style,
    wrapped,
)
from bgray.results import Entry, Results

LABELS = 9
"""At most so many variants have their name beside them."""
BARS = 24
"""Up to so many, intervals are drawn; the pointer shows those of others."""
WIDTH, HEIGHT = 420.0, 250.0
"""Pixels of a usual drawing area, to judge whether names would overlap."""
NAME = 16
"""Letters of a name beside its point: on a phone half the figure's width."""
KINDS = {
    "measured": "circle",
    "extrapolated": "circle-open",
    "GPU shared": "diamond-open",
    "no comparison": "x",
}
STAR = {"circle": "star", "circle-open": "star-open", "diamond-open": "star-diamond-open"}
"""The baseline's."""
SIDES = (("left", 10, 0), ("right", -10, 0), ("center", 0, 16), ("center", 0, -16))
SIDES += (("left", 9, 13), ("left", 9, -13), ("right", -9, 13), ("right", -9, -13))
"""Where a name may stand beside its point: how it is anchored, pixels to the right and up."""
Cost = Literal["vram", "minutes"]


@dataclass(frozen=True)
class _Point:
    entry: Entry
    x: float
    y: float | None
    """None: it cannot be compared."""
    interval: tuple[float, float] | None
    kind: str
    step: int | None
    base: bool
    text: str
    """For the pointer."""

    def is_full(self, last: int | None) -> bool:
        """Whether it was compared at the last step of all."""
        return self.base or self.step in (last, None)


def quality_cost(
    results: Results, metric: str, cost: Cost = "vram", chosen: Collection[str] | None = None
) -> go.Figure:
    """Variants' differences to the baseline, each at the last step both have reached, by what they
    cost; those that nothing beats in both joined by a line.

    Only those that were compared at the last step of all are full; the others are pale, and off
    that line. cost: the most GPU memory held, or minutes to 10000 steps.
    """
    comparison = results.comparisons.get(metric)
    if comparison is None:
        return blank(results.why_not or f"No variant has been compared by {metric} yet.")
    found = [point for entry in results.entries if (point := _point(results, entry, metric, cost))]
    if not found:
        what = {
            "vram": "No GPU memory is known: no trial has run on a GPU.",
            "minutes": "No time to 10k steps is known yet.",
        }
        return blank(what[cost])
    least = comparison.mode == "min"
    better = "↓ is better" if least else "↑ is better"
    made = figure(
        x={"vram": "GPU memory (GiB)", "minutes": "minutes to 10k steps"}[cost],
        y=f"{escaped(metric)} − baseline ({better})",
        keep=f"{results.url} {metric} {cost}",
    )
    last = max((p.step for p in found if p.step is not None and not p.base), default=None)
    chosen = {*(chosen or [])}
    low, high, notes = _range(found)
    costs = [point.x for point in found]
    left, right = padded(min(costs), max(costs), 0.08)
    made.update_layout(xaxis_range=[left, right], yaxis_range=[low, high])
    made.add_hline(0, line={"color": INK, "width": 1, "dash": "dot"}, layer="below")
    base = results.entries[0].id  # the baseline comes first
    # The time of a GPU that others used as well is no figure to compare.
    apart = "GPU shared" if cost == "minutes" else ""
    front = [p for p in found if p.y is not None and p.is_full(last) and p.kind != apart]
    front = _front(front, least)
    if len(front) > 1:
        _line(made, front)
    _points(made, found, last, chosen | {base} if chosen else set(), (low, high))
    first = [p for p in found if p.base] + [p for p in found if p.entry.id in chosen]
    rest = [*front, *(found if len(found) <= BARS else [])]
    _labels(made, first, rest, found, front, (left, right), (low, high))
    absent = [e for e in results.entries if e.id not in {p.entry.id for p in found}]
    if absent:
        names = ", ".join(f"{shortened(e.label)} ({cells.states(e.states)})" for e in absent[:3])
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        notes.append(f"no cost known of {names}{more}")
    note(made, notes)
    return made


def _point(results: Results, entry: Entry, metric: str, cost: Cost) -> _Point | None:
    timing = entry.time_to_10k
    kind = "measured"
    if cost == "vram":
        x = entry.vram_gib
    else:
        seconds = timing.get("time_to_10k_steps")
        x = None if seconds is None else seconds / 60
        if timing.get("packed"):
            kind = "GPU shared"
        elif timing.get("time_to_10k_steps_extrapolated"):
            kind = "extrapolated"
    if x is None:
        return None
    row = entry.rows.get(metric)
    said = cells.of(results, entry)
    texts = [shortened(entry.label, 80)]
    if entry.changes:
        texts.append(shortened(said["changes"], 200))
    y, interval, step = None, None, None
    base = entry.id == results.entries[0].id
    if base:
        y = 0.0
        step = None if row is None else row.step
        texts.append("the baseline")
    elif row is not None and row.parts is not None and row.verdict is not None:
        y, interval, step = row.parts.mean, row.verdict.interval, row.step
        texts.append(f"{metric} {said[f'{metric} difference']}")
        texts.append(f"at step {row.step}, {said['seeds']} seeds: {row.verdict.text}")
    else:
        kind = "no comparison"
        texts.append(f"no comparison: {said['states']}")
    texts.append(f"{said['vram']}, 10k steps {said['to_10k']}, {said['parameters']} parameters")
    return _Point(entry, float(x), y, interval, kind, step, base, "<br>".join(map(wrapped, texts)))


def _range(found: Sequence[_Point]) -> tuple[float, float, list[str]]:
    known = np.array([p.y for p in found if p.y is not None], float)
    low, high = bulk(known) or (0.0, 0.0)
    inside = [p for p in found if p.y is not None and low <= p.y <= high]
    low, high = min(low, 0.0), max(high, 0.0)
    bars = [(*p.interval, p.y) for p in inside if p.interval and p.y is not None]
    # As far as a few wide intervals do not squeeze the rest.
    usual = float(np.median([top - bottom for bottom, top, _ in bars])) if bars else 0.0
    reach = max(high - low, usual)
    for bottom, top, y in bars:
        low, high = min(low, max(bottom, y - reach)), max(high, min(top, y + reach))
    outside = len([p for p in found if p.y is not None]) - len(inside)
    notes = [f"{outside} far outside, drawn at the edge"] if outside else []
    low, high = padded(low, high, 0.1)
    cut = len([bar for bar in bars if bar[0] < low or bar[1] > high])
    if cut:
        notes.append(f"{cut} interval{'s' * (cut > 1)} longer than what is shown")
    return low, high, notes


def _front(found: Sequence[_Point], least: bool) -> list[_Point]:
    """Those that no other one beats in cost without being worse, or in quality without costing
    more; by cost."""
    sign = 1 if least else -1
    ordered = sorted(found, key=lambda p: (p.x, sign * (p.y or 0.0)))
    kept: list[_Point] = []
    for point in ordered:
        if not kept or sign * (point.y or 0.0) < sign * (kept[-1].y or 0.0):
            kept.append(point)
    return kept


def _line(made: go.Figure, front: Sequence[_Point]) -> None:
    made.add_trace(
        go.Scatter(
            x=[p.x for p in front],
            y=[p.y for p in front],
            mode="lines",
            line={"color": INK, "width": 1.2, "shape": "hv"},
            opacity=0.6,
            name="nothing is better and cheaper",
            hoverinfo="skip",
            uid="front",
        )
    )


def _points(
    made: go.Figure,
    found: Sequence[_Point],
    last: int | None,
    chosen: set[str],
    shown: tuple[float, float],
) -> None:
    room = 0.03 * (shown[1] - shown[0])
    bars = len([p for p in found if p.interval]) <= BARS
    for kind, symbol in KINDS.items():
        for full in (True, False):
            those = [p for p in found if p.kind == kind and full == p.is_full(last)]
            if not those:
                continue
            colours = [style(p.entry.number).colour for p in those]
            # Pale is what was compared early only; with a choice, also what was not chosen.
            alpha = 0.9 if full else 0.35
            pale = [alpha] * len(those)
            if chosen:
                pale = [alpha if p.entry.id in chosen else alpha * 0.35 for p in those]
            texts = [
                p.text if full else f"{p.text}<br>compared at step {p.step} only, others at {last}"
                for p in those
            ]
            ys = [shown[0] + room if p.y is None else p.y for p in those]
            for p, colour, dim in zip(those, colours, pale, strict=True):
                if p.interval and p.y is not None and (bars or p.entry.id in chosen):
                    _bar(made, p, colour, dim)
            made.add_trace(
                go.Scatter(
                    x=[p.x for p in those],
                    y=[min(max(y, shown[0] + room), shown[1] - room) for y in ys],
                    mode="markers",
                    text=texts,
                    hovertemplate="%{text}<extra></extra>",
                    showlegend=False,
                    cliponaxis=False,
                    legendgroup=f"{kind} {full}",
                    uid=f"{kind} {full}",
                    marker={
                        "symbol": [STAR.get(symbol, symbol) if p.base else symbol for p in those],
                        "color": colours,
                        "size": [15 if p.base else 10 for p in those],
                        "opacity": pale,
                        "line": {"width": 2, "color": colours},
                    },
                )
            )
            name = kind if full else f"{kind}, at an earlier step"
            made.add_trace(
                go.Scatter(
                    x=[None],
                    y=[None],
                    mode="markers",
                    name=name,
                    legendgroup=f"{kind} {full}",
                    marker={
                        "symbol": symbol,
                        "color": INK,
                        "size": 9,
                        "line": {"width": 2, "color": INK},
                    },
                    opacity=1.0 if full else 0.35,
                    uid=f"legend {kind} {full}",
                )
            )


def _bar(made: go.Figure, point: _Point, colour: str, alpha: float) -> None:
    assert point.interval is not None
    made.add_trace(
        go.Scatter(
            x=[point.x, point.x],
            y=list(point.interval),
            mode="lines",
            line={"color": colour, "width": 1.5},
            opacity=0.55 * alpha,
            showlegend=False,
            hoverinfo="skip",
            uid=f"bar {point.entry.id}",
        )
    )


def _labels(
    made: go.Figure,
    needed: Sequence[_Point],
    wanted: Sequence[_Point],
    found: Sequence[_Point],
    front: Sequence[_Point],
    across: tuple[float, float],
    up: tuple[float, float],
) -> None:
    """Names that do not lie on each other: beside those of `needed` if need be on other points,
    beside the first of `wanted` only where nothing is."""

    def at(x: float, y: float | None) -> tuple[float, float]:
        y = up[0] if y is None else min(max(y, up[0]), up[1])
        return (
            (x - across[0]) / (across[1] - across[0]) * WIDTH,
            (y - up[0]) / (up[1] - up[0]) * HEIGHT,
        )

    def strip(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, ...]:
        (left, right), (low, high) = (sorted(pair) for pair in zip(one, other, strict=True))
        return left - 2, low - 2, right + 2, high + 2

    taken: list[tuple[float, ...]]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in (at(p.x, p.y) for p in found)]
    taken.append(strip(at(across[0], 0.0), at(across[1], 0.0)))
    for one, other in zip(front, front[1:], strict=False):
        taken.append(strip(at(one.x, one.y), at(other.x, one.y)))
        taken.append(strip(at(other.x, one.y), at(other.x, other.y)))
    if len(found) <= BARS:
        taken += [
            strip(at(p.x, p.interval[0]), at(p.x, p.interval[1])) for p in found if p.interval
        ]
    names: list[tuple[float, ...]] = []
    done: set[str] = set()
    for point in (*needed, *wanted):
        if point.entry.id in done or len(done) >= LABELS or point.y is None:
            continue
        text = shortened(point.entry.label, NAME)
        text += " (baseline)" if point.base and text != cells.BASELINE else ""
        x, y = at(point.x, point.y)
        wide = 6.6 * len(text)
        places = []
        # Towards the middle first: a narrower figure cuts off what stands at its edge.
        inwards = "left" if x < WIDTH / 2 else "right"
        for anchor, dx, dy in sorted(SIDES, key=lambda side: side[0] not in (inwards, "center")):
            start = x + dx - wide * {"left": 0.0, "center": 0.5, "right": 1.0}[anchor]
            box = (start, y + dy - 7.5, start + wide, y + dy + 7.5)
            if box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT:
                places.append((box, anchor, dx, dy))
        free = [one for one in places if not any(_overlap(one[0], o) for o in (*taken, *names))]
        if not free and point in needed:
            free = [one for one in places if not any(_overlap(one[0], o) for o in names)]
        if not free:
            continue
        box, anchor, dx, dy = free[0]
        names.append(box)
        done.add(point.entry.id)
        made.add_annotation(
            x=point.x,
            y=min(max(point.y, up[0]), up[1]),
            text=escaped(text),
            showarrow=False,
            xanchor=anchor,
            yanchor="middle",
            xshift=dx,
            yshift=dy,
            bgcolor="rgba(255,255,255,0.6)",
            borderpad=0,
            font={"size": 11, "color": INK},
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    return not apart
