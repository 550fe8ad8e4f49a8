"""A sweep's figures, for page and report: learning curves; what quality costs; what varies."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from bgray.drawing import (
    FAINT,
    INK,
    blank,
    bulk,
    escaped,
    figure,
    note,
    number,
    padded,
    shortened,
    together,
    wrapped,
)
from bgray.drawing import Style as Style
from bgray.drawing import style as style
from bgray.parallel import parallel as parallel
from bgray.quality import quality_cost as quality_cost
from bgray.results import Entry, Results, Trial
from bgray.thinning import thinned

POINTS, ALL_POINTS = 1000, 100_000
"""At most so many of a curve, and about so many of a figure."""
MANY_POINTS = 6000
"""From so many on WebGL draws."""
FLAT = 1000.0
"""A hundredth of a trial's values may be this many interquartile ranges off, and no more, to be on
the axis."""
MANY_LINES = 60
"""From so many on lines are thinner."""
FEW = 8
"""Up to so many variants have their names in the legend, NAME letters of each: more would leave no
room for the curves."""
NAME = 16
ENDS = {
    "finished": "circle",
    "stopped": "square-open",
    "running": "triangle-right-open",
    "interrupted": "bowtie-open",
    "failed": "x",
    "diverged": "star-triangle-up",
    "out_of_memory": "cross",
    "damaged": "asterisk-open",
}
"""What shows how a trial ended."""
LOST = ("failed", "diverged", "out_of_memory", "damaged")


@dataclass(frozen=True)
class _Line:
    """A trial's curve, or the mean of several seeds' ones."""

    entry: Entry
    trial: Trial | None
    who: str
    x: np.ndarray
    y: np.ndarray
    steps: np.ndarray
    strong: bool


def learning_curves(
    results: Results,
    name: str,
    x: Literal["step", "minutes"] = "step",
    chosen: Collection[str] | None = None,
) -> go.Figure:
    """One line per trial, thin where the mean of a variant's seeds is drawn thick, each with a
    mark that says how it ended.

    name: of `results.curve_names()`. chosen: ids of variants that stand out; None or none: all.
    The axis shows what the usual trials do: one that diverged does not flatten the others. Whatever
    lies outside is noted, and its mark at the edge.
    """
    minutes = x == "minutes"
    results.fetch(minutes)
    lines: list[_Line] = []
    without: list[Trial] = []
    for entry in results.entries:
        found = {t.id: _line(results, entry, t, name, minutes) for t in entry.trials}
        seeds = [line for line in found.values() if line is not None]
        lines += seeds
        if mean := _mean(entry, [s for s in seeds if s.trial and s.trial.state not in LOST]):
            lines.append(mean)
        drawn = {id for id, line in found.items() if line is not None and len(line.x)}
        without += [t for t in entry.trials if t.state != "waiting" and t.id not in drawn]
    if not lines and not without:
        return blank(f"No trial has logged {name} yet.")
    way = {"min": " (lower is better)", "max": " (higher is better)"}.get(
        results.scores.get(name, ""), ""
    )
    made = figure(
        x="minutes of training" if minutes else "step",
        y=escaped(name) + way,
        keep=f"{results.url} {name} {x}",
    )
    low, high, notes = _range(results, name, lines)
    made.update_layout(yaxis_range=[low, high], xaxis_rangemode="tozero")
    chosen = {*(chosen or [])}
    _draw(made, results, name, lines, chosen, minutes)
    _ends(made, results, lines, without, chosen, (low, high), minutes)
    if not minutes:
        for rung in results.rungs:
            made.add_vline(rung, line={"color": FAINT, "width": 1}, opacity=0.5, layer="below")
    unknown = [line for line in lines if line.trial and len(line.y) and not len(line.x)]
    if unknown:
        notes.append(f"{len(unknown)} trials have not logged their time")
    note(made, notes)
    return made


def _line(results: Results, entry: Entry, trial: Trial, name: str, minutes: bool) -> _Line | None:
    steps, values = results.curve(trial, name)
    if not len(steps):
        return None
    at = results.minutes(trial, steps) if minutes else steps
    known = np.isfinite(at)
    who = f"{shortened(entry.label, 60)}, seed {trial.seed}"
    return _Line(entry, trial, who, at[known], values[known], steps[known], False)


def _mean(entry: Entry, lines: list[_Line]) -> _Line | None:
    """At the steps that all of these have."""
    lines = [line for line in lines if len(line.x)]
    if len(lines) < 2:
        return None
    shared = lines[0].steps
    for line in lines[1:]:
        shared = np.intersect1d(shared, line.steps)
    if not len(shared):
        return None
    picked = [np.searchsorted(line.steps, shared) for line in lines]
    x = np.mean([line.x[at] for line, at in zip(lines, picked, strict=True)], axis=0)
    y = np.mean([line.y[at] for line, at in zip(lines, picked, strict=True)], axis=0)
    seeds = ", ".join(str(line.trial.seed) for line in lines if line.trial)
    who = f"{shortened(entry.label, 60)}, mean of seeds {seeds}"
    return _Line(entry, None, who, x, y, shared, True)


def _small(values: np.ndarray) -> np.ndarray:
    """float32: half of what is sent to the page."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _range(results: Results, name: str, lines: Sequence[_Line]) -> tuple[float, float, list[str]]:
    """(bottom, top, what lies outside), of the curves and the unprocessed input's score."""
    trials = [line for line in lines if line.trial and np.isfinite(line.y).any()]
    if not trials:
        return 0.0, 1.0, []
    usual = [line for line in trials if line.trial and line.trial.state not in LOST] or trials
    # Hundreds that were stopped early are all at the top: those that went on are what is to be
    # seen.
    most = max(line.steps[-1] for line in usual)
    low, high = together(np.array([_span(line.y) for line in usual if line.steps[-1] >= most / 2]))
    room = high - low or np.inf
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in trials]).astype(float)
    values = values[(values >= low - room) & (values <= high + room)]
    low, high = min(low, float(values.min())), max(high, float(values.max()))
    given = results.unprocessed.get(name)
    room = (high - low) / 2 or np.inf
    if given is not None and low - room <= given <= high + room:
        low, high = min(low, given), max(high, given)
    low, high = padded(low, high)
    notes = []
    tops = [top for line in trials if (top := float(np.nanmax(line.y))) > high]
    bottoms = [bottom for line in trials if (bottom := float(np.nanmin(line.y))) < low]
    for side, found, end in (("above", tops, max), ("below", bottoms, min)):
        if found:
            those = f"{len(found)} trial{'s' * (len(found) > 1)} with values"
            notes.append(f"{those} {side} what is shown (to {end(found):.3g})")
    if given is not None and not low <= given <= high:
        side = "above" if given > high else "below"
        notes.append(f"unprocessed input: {number(given)}, {side} what is shown")
    return low, high, notes


def _span(values: np.ndarray) -> tuple[float, float]:
    """From where to where a curve goes; without a few values so far off that beside them it would
    be thinner than a pixel."""
    known = values[np.isfinite(values)].astype(float)
    low, high = bulk(known, FLAT) or (0.0, 0.0)
    few = np.count_nonzero((known < low) | (known > high)) <= len(known) / 100
    return (low, high) if few else (float(known.min()), float(known.max()))


def _draw(
    made: go.Figure,
    results: Results,
    name: str,
    lines: Sequence[_Line],
    chosen: set[str],
    minutes: bool,
) -> None:
    most = min(POINTS, max(20, ALL_POINTS // max(1, len(lines))))
    points = [thinned(line.y, most) for line in lines]
    heavy = sum(map(len, points)) > MANY_POINTS
    kind = go.Scattergl if heavy else go.Scatter
    means = {line.entry.id for line in lines if line.strong}
    entries = {line.entry.id for line in lines}
    base = results.baseline.id if results.baseline else None
    named = chosen | {base} if chosen else entries
    told = {id for id in named if id != base} if len(named & entries) > FEW else set()
    form = ".4f" if name in results.scores else ".5~g"
    many = len(lines) > MANY_LINES

    # Chosen ones last, so that they lie on top.
    def order(pair: tuple[_Line, np.ndarray]) -> tuple[bool, bool, bool]:
        return pair[0].entry.id in chosen, pair[0].entry.id == base, pair[0].strong

    for line, kept in sorted(zip(lines, points, strict=True), key=order):
        id = line.entry.id
        look = style(line.entry.number)
        faint = bool(chosen) and id not in named
        thick = line.strong or id not in means
        marked = id in chosen or id == base
        opacity = (0.18 if faint else 1.0) if thick else (0.12 if faint else 0.4)
        if not chosen and len(entries) > 2 * FEW and not marked:
            opacity *= 0.6
        width = 1.0 if not thick or faint or (many and not marked) else 2.0
        at = "%{x:.1f} min, step %{customdata}" if minutes else "step %{x}"
        made.add_trace(
            kind(
                x=line.x[kept].astype(np.float32 if minutes else np.int32),
                y=_small(line.y[kept]),
                customdata=line.steps[kept].astype(np.int32) if minutes else None,
                mode="lines" if len(kept) > 1 else "markers",
                name=escaped(shortened(line.entry.label, NAME)),
                legendgroup=id,
                showlegend=id in named and thick and id not in told,
                legendrank=1 + line.entry.number,
                uid=f"{id} mean" if line.trial is None else line.trial.id,
                opacity=opacity,
                line={
                    "color": look.colour,
                    # Dashes of hundreds of lines are noise.
                    "dash": look.dash if marked or not many else "solid",
                    "width": width,
                },
                marker={"color": look.colour, "symbol": look.symbol, "size": 5},
                # Not in the template itself: there %{...} is a command.
                meta=[escaped(line.who), escaped(name)],
                hovertemplate=f"%{{meta[0]}}<br>{at}<br>%{{meta[1]}} %{{y:{form}}}<extra></extra>",
            )
        )
        if thick and id in named:
            told.add(id)
    given = results.unprocessed.get(name)
    ends = [line.x[[0, -1]] for line in lines if len(line.x)]
    if given is not None and ends:
        span = np.array([0.0, max(pair[1] for pair in ends)])
        made.add_trace(
            go.Scatter(
                x=span,
                y=np.full(2, given),
                mode="lines",
                name="unprocessed input",
                legendrank=2000,
                uid="unprocessed",
                line={"color": INK, "dash": "dot", "width": 1.5},
                hovertemplate="unprocessed input %{y:.4f}<extra></extra>",
            )
        )


def _ends(
    made: go.Figure,
    results: Results,
    lines: Sequence[_Line],
    without: Sequence[Trial],
    chosen: set[str],
    shown: tuple[float, float],
    minutes: bool,
) -> None:
    """How each trial ended: a symbol, and the reason where the pointer is."""
    marks: dict[str, list[dict[str, Any]]] = {}
    numbers = {entry.id: entry.number for entry in results.entries}
    room = (shown[1] - shown[0]) * 0.02
    low, high = shown[0] + room, shown[1] - room

    def mark(trial: Trial, x: float, y: float, text: str) -> None:
        state = trial.state.replace("_", " ")
        why = f" ({shortened(trial.reason, 90)})" if trial.reason else ""
        who = f"{shortened(trial.label, 60)}, seed {trial.seed}"
        faint = bool(chosen) and trial.variant not in chosen and trial.state not in LOST
        marks.setdefault(trial.state, []).append(
            {
                "x": x,
                "y": min(max(y, low), high),
                "colour": style(numbers.get(trial.variant, 0)).colour,
                "opacity": 0.25 if faint else 1.0,
                "text": f"{wrapped(who)}<br>{wrapped(state + why)}<br>{escaped(text)}",
            }
        )

    for line in lines:
        if line.trial is not None and len(line.x):
            known = line.y[np.isfinite(line.y)]
            y = float(known[-1]) if len(known) else low
            mark(line.trial, line.x[-1], y, f"step {line.steps[-1]:.0f}: {number(line.y[-1])}")
    for trial in without:
        if trial.state == "finished":
            continue
        x = trial.step
        if minutes:
            x = float(np.nan_to_num(results.minutes(trial, np.array([float(x)]))[0]))
        mark(trial, x, low, f"step {trial.step}: no value before")
    many = sum(map(len, marks.values())) > 60
    for state, symbol in ENDS.items():
        found = marks.pop(state, [])
        if found:
            size = 9 if state in LOST else (5 if many else 7)
            _marks(made, state.replace("_", " "), symbol, size, found)
    for state, found in marks.items():  # of another version
        _marks(made, state, "circle-open", 7, found)


def _marks(
    made: go.Figure, state: str, symbol: str, size: int, found: Sequence[Mapping[str, Any]]
) -> None:
    made.add_trace(
        go.Scatter(
            x=[one["x"] for one in found],
            y=[one["y"] for one in found],
            text=[one["text"] for one in found],
            mode="markers",
            marker={
                "symbol": symbol,
                "size": size,
                "color": [one["colour"] for one in found],
                "opacity": [one["opacity"] for one in found],
                "line": {"width": 1.5, "color": [one["colour"] for one in found]},
            },
            hovertemplate="%{text}<extra></extra>",
            legendgroup=f"state {state}",
            showlegend=False,
            cliponaxis=False,
            uid=f"state {state}",
        )
    )
    made.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=state,
            marker={
                "symbol": symbol,
                "size": 8,
                "color": INK,
                "line": {"width": 1.5, "color": INK},
            },
            legendgroup=f"state {state}",
            legendrank=3000,
            uid=f"legend {state}",
        )
    )
