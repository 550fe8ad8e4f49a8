"""What all figures share: colours, dashes and symbols that can be told apart, text that is safe,
ranges that an outlier does not spoil."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Chosen by search: the least CIE-Lab distance of two is 25 for normal sight, deuteranopia and
# protanopia (Machado 2009), the least contrast on white 3:1. The first is the baseline's.
COLOURS = ("#333333", "#0077bb", "#bb8800", "#990000")
COLOURS += ("#669955", "#cc5588", "#0000ff", "#0066ff")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "pentagon",
    "star",
    "hexagon",
)
GOOD, NEUTRAL, BAD = "#0072b2", "#8a8a8a", "#d55e00"
"""Better than the baseline, as good, worse: Okabe and Ito's blue and vermilion."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK, SMALL, FAINT, GRID = "#444444", "#5f5f5f", "#b0b0b0", "rgba(128,128,128,0.25)"
FENCE = 8.0
"""So many interquartile ranges beyond the quartiles, a value does not stretch an axis."""
SQUEEZE = 20.0
"""A curve that goes so many times the usual one's height beyond it does not stretch an axis."""


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str
    symbol: str


def style(number: int) -> Style:
    """Of the variant with this number: the first 48 differ in colour or dash, the first 64 in
    colour or symbol."""
    turn = number // len(COLOURS)
    return Style(
        COLOURS[number % len(COLOURS)],
        DASHES[turn % len(DASHES)],
        SYMBOLS[(number + turn) % len(SYMBOLS)],
    )


def escaped(text: Any) -> str:
    """Somebody's text as Plotly shows it letter by letter: it takes some tags for HTML, and %{...}
    for a value to be filled in."""
    return html.escape(str(text), quote=False).replace("%{", "&#37;{")


def shortened(text: Any, most: int = 24) -> str:
    """Its ends where it is longer, since long names often differ in their last letters."""
    line = " ".join(str(text).split())
    if len(line) <= most:
        return line
    front = (most - 1) * 3 // 5
    return f"{line[:front]}…{line[len(line) - (most - 1 - front) :]}"


def figure(*, x: str = "", y: str = "", keep: str = "") -> go.Figure:
    """An empty one.

    keep: zoom and hidden lines stay as they are while this stays the same.
    """
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 12}},
    }
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": FONT, "size": 12, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 34, "t": 12, "b": 44},
            "modebar": {
                "orientation": "v",
                "bgcolor": "rgba(0,0,0,0)",
                "color": FAINT,
                "activecolor": INK,
                "remove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
            },
            "xaxis": {**axis, "title": {**axis["title"], "text": x}},
            "yaxis": {**axis, "title": {**axis["title"], "text": y}},
            "hovermode": "closest",
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left", "namelength": -1},
            "legend": {
                "orientation": "h",
                "yanchor": "bottom",
                "y": 1.0,
                "x": 0,
                "font": {"size": 11},
                "itemsizing": "constant",
                "tracegroupgap": 0,
                "maxheight": 0.24,  # on a phone it scrolls
            },
            "uirevision": keep or None,
        }
    )


def blank(why: str) -> go.Figure:
    """No axes, and why there is nothing to see."""
    made = figure()
    made.update_layout(xaxis_visible=False, yaxis_visible=False)
    made.add_annotation(
        text=wrapped(why), showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper"
    )
    return made


def wrapped(text: str, width: int = 72) -> str:
    """Escaped, with breaks."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join(escaped(line) for line in [*lines, line])


def note(made: go.Figure, texts: Sequence[str]) -> None:
    """What the figure does not show, in small print under its axis, where no curve is."""
    small = "<br>".join(f"<i>{wrapped(text, 96)}</i>" for text in texts)
    if not small:
        return
    axis: Any = made.layout["xaxis"]
    if axis.visible is False:
        made.add_annotation(
            text=small,
            showarrow=False,
            x=1,
            y=0,
            xref="paper",
            yref="paper",
            xanchor="right",
            yanchor="top",
            yshift=-14,
            align="right",
            font={"size": 11, "color": SMALL},
        )
        return
    title = axis.title.text or ""
    style = f"font-size:11px;color:{SMALL}"
    made.update_xaxes(title_text=f'{title}<br><span style="{style}">{small}</span>')


def bulk(values: np.ndarray, fence: float = FENCE) -> tuple[float, float] | None:
    """Least and greatest of values (N,), those left out that lie far from all the others; None
    where there is none.

    Nothing is too far from values that are all the same, since a flat line stays one on any axis,
    nor is a quarter of all: of those only what lies far from the others of them is left out.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [0.25, 0.75])
    # In float64: the difference of two huge float32 is infinite.
    spread, least = float(high) - float(low), 1e-7 * max(abs(float(low)), abs(float(high)))
    flat = spread <= least
    reach = least if flat else fence * spread
    near = (known >= low - reach) & (known <= high + reach)
    ends = [float(known[near].min()), float(known[near].max())]
    if flat or near.mean() < 0.75:
        ends += bulk(known[~near], fence) or ()
    return min(ends), max(ends)


def together(spans: np.ndarray) -> tuple[float, float]:
    """Least and greatest of curves that each go from low to high, (N, 2), N > 0; those left out
    beside which a usual one would be flat."""
    heights = spans[:, 1] - spans[:, 0]
    low, high = spans[np.argsort(heights, kind="stable")[(len(spans) - 1) // 2]]
    # Of actual curves: between a usual and a huge one there is only a huge number.
    quartiles = (
        np.quantile(spans, 0.25, axis=0, method="higher"),
        np.quantile(spans, 0.75, axis=0, method="lower"),
    )
    scale = max(high - low, *(quartiles[1] - quartiles[0]))
    if scale <= 1e-7 * max(abs(low), abs(high)):  # a flat line stays one on any axis
        others = spans[(spans[:, 0] < low - scale) | (spans[:, 1] > high + scale)]
        ends = [(low, high), *([together(others)] if len(others) else [])]
    else:
        bottom, top = low - SQUEEZE * scale, high + SQUEEZE * scale
        ends = spans[(spans[:, 0] >= bottom) & (spans[:, 1] <= top)]
    return float(np.min(ends)), float(np.max(ends))


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """With room at both ends."""
    room = share * (high - low) or max(abs(high) * 0.05, 1e-6)
    return low - room, high + room


def number(value: float) -> str:
    """Four digits, as tables have them; very large and small ones shorter."""
    if not math.isfinite(value):
        return "no number"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
