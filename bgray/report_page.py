"""report.html: one file that needs nothing else but the clips beside it."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any
from urllib.parse import quote

from bgray import findings
from bgray.cells import BASELINE, NOTHING
from bgray.findings import Column, Line, Section
from bgray.report_clips import Item, Lane, listening, picture
from bgray.report_text import OVERVIEW, overview
from bgray.results import Results

TALL = 420
"""Pixels of a figure."""


def page_of(sections: Sequence[Section]) -> bytes:
    """The whole file, plotly.js included (some 5 MB)."""
    from plotly.offline import get_plotlyjs

    single = len(sections) == 1 and not sections[0].folder
    title = sections[0].results.name if single else f"{len(sections)} sweeps"
    figures = _Figures()
    body = [] if single else [_overview(sections)]
    for number, section in enumerate(sections):
        body.append(_section(section, f"s{number}", figures, headed=not single))
    scripts = [get_plotlyjs(), _asset("report.js")] if figures.made else [_asset("report.js")]
    scripts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in scripts]
    data = "".join(
        f'<script type="application/json" id="{id}">{text}</script>\n'
        for id, text in figures.made.items()
    )
    state = findings.standing(sections[0].results) if single else ""
    against = findings.aim(sections[0].results) if single else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
{_paragraph(state)}{_paragraph(against)}</header>
<main>
{"".join(body)}</main>
{data}{"".join(f"<script>{text}</script>" for text in scripts)}
</body>
</html>
""".encode()


def _policy(scripts: Sequence[str]) -> str:
    """Nothing from anywhere else. unsafe-eval: plotly's parallel coordinates and long curves are
    drawn by WebGL, whose library builds its functions from text; only the scripts of this page,
    named by their hashes, can use it. unsafe-inline styles: plotly sets them."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    own = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src 'unsafe-eval' {own}; style-src 'unsafe-inline'; "
        "img-src 'self' file: data: blob:; media-src 'self' file:; "
        "base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return resources.files("bgray").joinpath("assets", name).read_text(encoding="utf-8")


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>\n" if text else ""


# --- sections


def _overview(sections: Sequence[Section]) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in OVERVIEW)
    rows = ""
    for number, (first, *rest) in enumerate(overview(sections)):
        cells = "".join(f'<td><div class="fold">{escape(text)}</div></td>' for text in rest)
        rows += f'<tr><th scope="row"><a href="#s{number}">{escape(first)}</a></th>{cells}</tr>\n'
    caption = "<caption><span>Each sweep against its own baseline</span></caption>"
    table = f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>"
    return _scroll(table, "All sweeps")


def _scroll(table: str, label: str) -> str:
    """Wide tables scroll inside themselves, by keyboard too."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"{table}</div>\n"
    )


def _section(section: Section, id: str, figures: "_Figures", *, headed: bool) -> str:
    results = section.results
    found = [f'<section id="{id}">\n']
    if headed:
        found.append(f"<h2>{escape(section.folder)}</h2>\n")
        found.append(_paragraph(findings.standing(results)))
        found.append(_paragraph(findings.aim(results)))
    found.append(_variants(section))
    if results.problems:
        found.append(_titled("Files that could not be read", _items(findings.problems(results))))
    if schedule := findings.schedule(section):
        found.append(_titled("Schedule", _items(schedule)))
    if items := listening(section):
        found.append(_listening(section, items))
    found.append(_drawn(results, figures))
    if heard := findings.heard_lines(section):
        found.append(_titled("Blind tests", _items(heard)))
    ended = [
        f"{trial.label}, seed {trial.seed} ({trial.id}): {text}"
        for trial, text in findings.unfinished(section)
    ]
    if ended:
        found.append(_titled("Trials that ended early", _items(ended)))
    warned = [f"{text}: {findings.who(trials)}" for text, trials in findings.warned(section)]
    if warned:
        found.append(_titled("Warnings", _items(warned)))
    logs = [findings.log_entry(section, entry) for entry in section.entries]
    text = escape("\n\n".join("\n".join(lines) for lines in logs))
    found.append(f"<details><summary>For the log</summary><pre>{text}</pre></details>\n")
    return "".join([*found, "</section>\n"])


def _titled(title: str, content: str) -> str:
    return f"<h3>{escape(title)}</h3>\n{content}"


def _items(texts: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(text)}</li>\n" for text in texts) + "</ul>\n"


# --- the table of variants


def _variants(section: Section) -> str:
    lines = findings.lines(section)
    tables = [_table(section, findings.columns(section), lines, main=True)]
    tables.append(_paragraph(findings.legend(section), "small"))
    if more := findings.columns(section, more=True)[1:]:
        tables.append(_table(section, [Column("variant", "variant"), *more], lines, main=False))
    return "".join(tables)


def _table(section: Section, columns: list[Column], lines: list[Line], *, main: bool) -> str:
    """Sorted by a click on a head. A score has one column: the mean, and below it the difference
    and what it is a difference to; it is sorted by that."""
    results = section.results
    shown = [
        c for c in columns if c.key.partition(" ")[0] not in results.scores or " " not in c.key
    ]
    shown += [Column("note", "ear notes")] if main else []
    # What it is all for stands where a phone shows it.
    shown.sort(
        key=lambda column: (
            ("variant", "verdict").index(column.key) if column.key in ("variant", "verdict") else 2
        )
    )
    heads = "".join(
        f'<th scope="col"{" class=number" if column.number else ""} aria-sort="none">'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in shown
    )
    title = "Variants" if main else "Further scores"
    said = findings.method(results) if main else ""
    caption = f"<caption><span><strong>{title}</strong> {escape(said)}</span></caption>"
    numbers = {section.id(entry.id): entry.number for entry in results.entries}
    rows = "".join(_row(results, shown, line, numbers.get(line.id)) for line in lines)
    table = (
        f'<table class="sorts">{caption}<thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody>'
        "</table>"
    )
    return _scroll(table, title)


LONG = ("variant", "changes", "seeds", "states", "verdict", "note")
"""Columns whose text is folded."""


def _row(results: Results, columns: list[Column], line: Line, number: int | None) -> str:
    found = ""
    for column in columns:
        key = column.key
        text = line.note if key == "note" else line.cells.get(key, "")
        content, order = escape(text), line.order.get(key)
        if key == "note":
            content = re.sub(r"&lt;br ?/?&gt;", "<br>", content)
        if key in results.scores:
            content, order = _score(line, key)
        if key in LONG and content:
            content = _swatch(number) * (key == "variant") + content
            content = f'<div class="fold {key}" title="{escape(text)}">{content}</div>'
        if key == "variant":
            found += f'<th scope="row">{content}</th>'
            continue
        kinds = ["number"] * column.number
        kinds += [text] * (key == "verdict" and text in ("better", "worse"))
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        sort = "" if order is None else f' data-sort="{order!r}"'
        found += f"<td{kind}{sort}>{content}</td>"
    return f"<tr>{found}</tr>\n"


def _score(line: Line, score: str) -> tuple[str, float | None]:
    """(the cell, what it is sorted by: 0 for the baseline, nothing for what is not compared)."""
    content = escape(line.cells.get(score, ""))
    difference = line.cells.get(f"{score} difference", "")
    if line.cells.get("verdict") == BASELINE:
        return content, 0.0
    if difference in ("", NOTHING):
        return content, None
    base = line.cells.get(f"{score} baseline", "")
    content += f'<br><span class="small">{escape(difference)}<br>from {escape(base)}</span>'
    return content, line.order.get(f"{score} difference")


def _swatch(number: int | None) -> str:
    """The colour that the variant has in the figures."""
    if number is None:
        return ""
    from bgray.figures import style

    return f'<span class="swatch" style="background:{escape(style(number).colour)}"></span>'


# --- clips


def _listening(section: Section, items: Sequence[Item]) -> str:
    trials = section.results.trials
    which = "Each variant at the step at which it is compared, its first seed"
    if not section.results.comparisons:
        which = "Each at its last step with clips"
    said = (
        f"{which}, as loud as it is: of two alike sounds the louder one is often liked more. "
        "The dashboard matches loudness and has blind tests."
    )
    found = [_titled("Listen", _paragraph(said, "small")), '<div class="items">\n']
    for item in items:
        beside = any(lane.beside for lane in item.lanes)
        heads = ["", "step", "seed", "sound"] + ["the baseline at that step"] * beside
        head = "".join(
            f'<th scope="col"{" class=number" * (h in ("step", "seed"))}>{escape(h)}</th>'
            for h in heads[1:]
        )
        rows = "".join(_lane(section, lane, trials, beside=beside) for lane in item.lanes)
        name = f"Item {item.number:03d}" + (f", {item.source}" if item.source else "")
        table = (
            f"<table><caption><span>{escape(name)}</span></caption><thead><tr><td></td>{head}</tr></thead>"
            f"<tbody>\n{rows}</tbody></table>"
        )
        found.append(_scroll(table, name))
    return "".join([*found, "</div>\n"])


def _lane(section: Section, lane: Lane, trials: dict[str, Any], *, beside: bool) -> str:
    step = "" if lane.step is None else str(lane.step)
    step += "" if lane.matched else " (not compared there)"
    seed = "" if lane.seed is None else str(lane.seed)
    cells = f"<td class=number>{step}</td><td class=number>{seed}</td>"
    cells += f"<td>{_player(section, lane.run, lane.file, lane.name, trials)}</td>"
    if beside:
        other = lane.beside
        name = f"the baseline beside {lane.name}"
        cells += f"<td>{_player(section, *other, name, trials) if other else ''}</td>"
    return f'<tr><th scope="row">{escape(lane.name)}</th>{cells}</tr>\n'


def _player(section: Section, run: str, file: str, name: str, trials: dict[str, Any]) -> str:
    link = quote(section.path(run, "clips", file))
    sound = f'<audio controls preload="none" src="{link}" aria-label="{escape(name)}"></audio>'
    image = picture(trials[run], file)
    if image is None:
        return sound
    seen = quote(section.path(run, "clips", image))
    return f'{sound}<br><img loading="lazy" src="{seen}" alt="{escape(name)} as notes">'


# --- figures


class _Figures:
    """Figures as JSON, drawn by the page when they come into view."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def add(self, figure: Any, title: str, kind: str = "") -> str:
        id = f"figure{len(self.made)}"
        self.made[id] = figure.to_json().replace("<", "\\u003c")  # no </script> in a name
        return (
            f"<figure{kind and f' class={kind}'}><figcaption>{escape(title)}</figcaption>"
            f'<div class="plot" data-figure="{id}" role="img" aria-label="{escape(title)}" '
            f'style="height:{TALL}px"></div></figure>\n'
        )


def _drawn(results: Results, figures: _Figures) -> str:
    from bgray import figures as draw

    begun = any(trial.run for trial in results.trials.values())
    if not begun:
        return ""
    found = ""
    metric = results.metric
    names = [n for n in results.curve_names() if n in results.scores or n == "loss"]
    for name in names:
        found += figures.add(draw.learning_curves(results, name), f"{name} by step")
        if name == metric:
            by = draw.learning_curves(results, name, x="minutes")
            found += figures.add(by, f"{name} by minutes of training")
    if metric in results.comparisons:
        assert metric is not None
        costs: list[tuple[Any, str]] = [("vram", "VRAM"), ("minutes", "time")]
        if all(entry.vram_gib is None for entry in results.entries):
            costs = costs[1:]  # on a CPU
        for cost, title in costs:
            figure = draw.quality_cost(results, metric, cost)
            found += figures.add(figure, f"{metric} against {title}")
        if results.varying:
            found += figures.add(
                draw.parallel(results, metric), "What varies, and how it does", "wide"
            )
    note = "<noscript><p>Figures need JavaScript.</p></noscript>"
    return f"<h3>Figures</h3>\n{note}<div class=figures>\n{found}</div>\n"
