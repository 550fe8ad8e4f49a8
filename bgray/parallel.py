"""Parallel coordinates: what varies between variants, an axis each, and what came of it."""

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

import plotly.graph_objects as go

from bgray import cells
from bgray.drawing import BAD, FONT, GOOD, INK, NEUTRAL, blank, escaped, figure, note, shortened
from bgray.results import Results, as_text

AXES = 10
"""At most so many settings; those with the most different values."""
TICKS = 12
"""At most so many ticks with text on an axis."""
MANY_TICKS = 16
"""At most so many categories have their text."""
CLOSE = 0.045
"""Ticks that are nearer than this share of the axis would be written over each other."""
LOG = 30.0
"""From this ratio of the greatest to the least on, an axis of positive numbers is logarithmic."""
LOST, ASIDE = -1.5, 1.5
"""Colour of what cannot be compared; of what is not chosen."""


def parallel(results: Results, metric: str, chosen: Collection[str] | None = None) -> go.Figure:
    """One line per variant: the settings that vary, how its trials ended where not all have
    finished, and its difference to the baseline at the last step both have reached.

    Blue is better than the baseline, orange worse; a variant that cannot be compared is black and
    ends at `none`. chosen: ids of variants that keep their colour; None or none: all.
    """
    entries = [entry for entry in results.entries if results.settings(entry)]
    if len(entries) < 2:
        if len(results.entries) < 2:
            return blank("There is only one variant: nothing to set beside it.")
        begun = "Only one variant has" if entries else "No variant has"
        return blank(f"{begun} begun: there is nothing to set beside another yet.")
    values = {
        key: [results.settings(entry).get(key) for entry in entries] for key in results.varying
    }
    values = {key: found for key, found in values.items() if len({*map(_key, found)}) > 1}
    if not values:
        return blank("The settings of all variants are the same: nothing varies.")
    notes = []
    if len(values) > AXES:
        most = sorted(values, key=lambda key: -len({*map(_key, values[key])}))[:AXES]
        notes.append(f"{len(values) - AXES} more settings vary: those with the fewest values")
        values = {key: values[key] for key in values if key in most}
    wide = max(8, 110 // (len(values) + 2))
    names = cells.setting_names(results.varying)
    dimensions = [
        _dimension(escaped(shortened(names[key], max(wide, 14))), found, wide)
        for key, found in values.items()
    ]
    states = [cells.states(entry.states) for entry in entries]
    if {*states} != {"finished"} and len({*states}) > 1:
        dimensions.append(_categories("state", states, wide))
    comparison = results.comparisons.get(metric)
    differences: list[float | None] = []
    for place, entry in enumerate(entries):
        row = entry.rows.get(metric)
        base = entry.id == results.entries[0].id and comparison is not None
        found = None if row is None or row.parts is None else row.parts.mean
        differences.append(0.0 if base and not place else found)
    if comparison is not None:
        arrow = "↓" if comparison.mode == "min" else "↑"
        label = f"Δ {shortened(metric, 16)} {arrow}"
        dimensions.append(_numbers(label, differences, none="none", log=False, form="+.4f"))
        steps = {row.step for e in entries[1:] if (row := e.rows.get(metric)) and row.step}
        if len(steps) > 1:
            notes.append(f"compared at steps {min(steps)} to {max(steps)}: see the table")
    least = comparison is None or comparison.mode == "min"
    made = figure(keep=f"{results.url} {metric} parallel")
    made.update_layout(xaxis_visible=False, yaxis_visible=False)
    made.update_layout(margin={"l": 70, "r": 64, "t": 56, "b": 34})
    text = {"family": FONT, "size": 11, "color": INK}
    made.add_trace(
        go.Parcoords(
            dimensions=dimensions,
            line=_line(entries, differences, {*(chosen or [])}, least),
            labelfont={**text, "size": 12},
            labelangle=-12 if len(dimensions) > 6 else 0,
            tickfont=text,
            # The ends of the axes are ticks already.
            rangefont={"size": 1, "color": "rgba(0,0,0,0)"},
            uid="parallel",
        )
    )
    note(made, notes)
    return made


def _line(
    entries: Sequence[Any], differences: Sequence[float | None], chosen: set[str], least: bool
) -> dict[str, Any]:
    known = sorted(abs(d) for d in differences if d is not None and math.isfinite(d))
    # Not the greatest: one that is ten times as far off would leave no colour to the rest.
    reach = known[int(0.9 * (len(known) - 1))] if known else 0.0
    reach = reach or (known[-1] if known else 0.0) or 1.0
    colours = []
    for entry, difference in zip(entries, differences, strict=True):
        if chosen and entry.id not in chosen:
            colours.append(ASIDE)
        elif difference is None or not math.isfinite(difference):
            colours.append(LOST)
        else:
            colours.append(max(-1.0, min(1.0, difference / reach)))
    low, high = (GOOD, BAD) if least else (BAD, GOOD)
    at = [(-1.5, "#000000"), (-1.2, "#000000"), (-1.2, low), (-1.0, low), (0.0, NEUTRAL)]
    at += [(1.0, high), (1.2, high), (1.2, "#dddddd"), (1.5, "#dddddd")]
    return {
        "color": colours,
        "cmin": LOST,
        "cmax": ASIDE,
        "colorscale": [[(x - LOST) / (ASIDE - LOST), colour] for x, colour in at],
        "showscale": False,
    }


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _dimension(label: str, values: Sequence[Any], wide: int) -> dict[str, Any]:
    """An axis of numbers where all are, or else of categories."""
    plain = [v for v in values if v is not None]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in plain)
    if numeric and any(math.isfinite(v) for v in plain):
        found = [float(v) if v is not None and math.isfinite(v) else None for v in values]
        none = next((as_text(v) for v, f in zip(values, found, strict=True) if f is None), "")
        return _numbers(label, found, none=none)
    return _categories(label, [as_text(v) for v in values], wide)


def _numbers(
    label: str,
    values: Sequence[float | None],
    none: str,
    log: bool | None = None,
    form: str = ".6g",
) -> dict[str, Any]:
    known = sorted({v for v in values if v is not None and math.isfinite(v)})
    if not known:
        return _categories(label, [none for _ in values], 20)
    if log is None:
        log = known[0] > 0 and known[-1] / known[0] >= LOG
    place = math.log10 if log else float
    low, high = place(known[0]), place(known[-1])
    span = (high - low) or abs(high) or 1.0
    if low == high:
        low, high = low - span / 2, high + span / 2
    exact = known if len(known) <= TICKS else _round_ones(known, place)
    ticks = _apart([(place(v), v) for v in exact], CLOSE * span)
    missing = any(v is None or not math.isfinite(v) for v in values)
    below = low - 0.12 * span
    # Where there is not a tick for each value, the ends say about how far the axis goes.
    form = form if len(known) <= TICKS or form.startswith("+") else ".3g"
    texts = [format(v, form) for _, v in ticks]
    return {
        "label": label,
        "values": [below if v is None or not math.isfinite(v) else place(v) for v in values],
        "range": [below if missing else low, high],
        "tickvals": [*([below] if missing else []), *(at for at, _ in ticks)],
        "ticktext": [*([none or "-"] if missing else []), *texts],
    }


def _round_ones(known: Sequence[float], place: Any) -> list[float]:
    """The least, the greatest, and some round values between."""
    low, high = place(known[0]), place(known[-1])
    found = []
    for part in range(1, 6):
        at = low + (high - low) * part / 6
        value = 10**at if place is math.log10 else at
        found.append(float(f"{value:.2g}"))
    return [known[0], *(v for v in found if known[0] < v < known[-1]), known[-1]]


def _apart(ticks: Sequence[tuple[float, float]], least: float) -> list[tuple[float, float]]:
    """Both ends, and those between that are not too near to another."""
    kept = [ticks[0]]
    for tick in ticks[1:-1]:
        if tick[0] - kept[-1][0] >= least and ticks[-1][0] - tick[0] >= least:
            kept.append(tick)
    return [*kept, ticks[-1]] if len(ticks) > 1 else kept


def _categories(label: str, values: Sequence[str], wide: int) -> dict[str, Any]:
    """In the order in which they come, bottom to top."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    every = -(-len(places) // MANY_TICKS)
    shown = [(place, value) for value, place in places.items() if place % every == 0]
    return {
        "label": label,
        "values": [places[value] for value in values],
        "range": [-0.1, len(places) - 0.9] if len(places) > 1 else [-1, 1],
        "tickvals": [place for place, _ in shown],
        "ticktext": [shortened(value, wide) or "-" for _, value in shown],
    }
