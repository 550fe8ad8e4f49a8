"""REPORT.md: the variants as a table that diffs well in git, lines for a log, what went wrong."""

import re
from collections.abc import Sequence

from bgray import findings, notes
from bgray.findings import Section
from bgray.notes import cell, id_cell, note_cell, table
from bgray.report_clips import Lane, listening
from bgray.verdicts import Kind


def text_of(sections: Sequence[Section], gone: Sequence[notes.Note] = ()) -> str:
    """The whole file. Several sections get an overview on top.

    gone: notes of variants that are in none of them any more.
    """
    found: list[str] = []
    if len(sections) == 1 and not sections[0].folder:
        found += [f"# {cell(sections[0].results.name)}", "", *_section(sections[0], "##")]
    else:
        found += [f"# {len(sections)} sweeps", "", *_overview(sections), ""]
        for section in sections:
            found += [f"## {cell(section.folder)}", "", *_section(section, "###"), ""]
    if gone:
        found += ["", "## Ear notes of variants that are gone", ""]
        heads = [notes.NAME, notes.NOTES, notes.ID]
        found += table(heads, [[one.label, note_cell(one.text), id_cell(one.id)] for one in gone])
    return notes.sealed("\n".join(found))


OVERVIEW = ("sweep", "compared by", "trials", "better", "worse", "neither")


def overview(sections: Sequence[Section]) -> list[list[str]]:
    """Plain cells, a row per sweep."""
    return [
        [
            section.folder or section.results.name,
            findings.against(section.results),
            findings.standing(section.results),
            _with(section, "better"),
            _with(section, "worse"),
            _with(section, "same", "open", "unstable", "none"),
        ]
        for section in sections
    ]


def _with(section: Section, *kinds: Kind) -> str:
    """Labels of the variants with such a verdict; of many, how many."""
    metric = section.results.metric or ""
    found = [
        entry.label
        for entry in section.entries
        if (row := entry.rows.get(metric)) and row.verdict and row.verdict.kind in kinds
    ]
    return ", ".join(found) if 0 < len(found) <= 4 else str(len(found) or "-")


def _overview(sections: Sequence[Section]) -> list[str]:
    return table(list(OVERVIEW), [[cell(text) for text in row] for row in overview(sections)])


def _section(section: Section, level: str) -> list[str]:
    results = section.results
    found = [f"{cell(findings.standing(results))}."]
    found += [f"{cell(findings.aim(results))}.", "", *_table(section), ""]
    method = cell(findings.method(results))
    found += [f"{method[:1].upper()}{method[1:]}."]
    if legend := findings.legend(section):
        found += ["", f"{cell(legend)}."]
    if schedule := findings.schedule(section):
        found += ["", f"{level} Schedule", "", *(f"- {cell(line)}" for line in schedule)]
    if more := findings.columns(section, more=True)[1:]:
        columns = [findings.Column("variant", "variant"), *more]
        rows = [
            [cell(line.cells.get(c.key, "")) for c in columns] for line in findings.lines(section)
        ]
        found += ["", f"{level} Further scores", ""]
        found += table([cell(c.title) for c in columns], rows, _right(columns))
    if heard := findings.heard_lines(section):
        found += ["", f"{level} Blind tests", "", *(f"- {cell(line)}" for line in heard)]
    if results.problems:
        found += ["", f"{level} Files that could not be read", ""]
        found += [f"- {cell(text)}" for text in findings.problems(results)]
    if unfinished := findings.unfinished(section):
        found += ["", f"{level} Trials that ended early", ""]
        found += [
            f"- {cell(trial.label)}, seed {trial.seed} (`{trial.id}`): {cell(text)}"
            for trial, text in unfinished
        ]
    if warned := findings.warned(section):
        found += ["", f"{level} Warnings", ""]
        found += [f"- {cell(text)}: {cell(findings.who(trials))}" for text, trials in warned]
    logs = [findings.log_entry(section, entry) for entry in section.entries]
    if logs:
        content = "\n\n".join("\n".join(lines) for lines in logs)
        longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
        fence = "`" * max(3, longest + 1)
        found += ["", f"{level} For the log", "", fence + "text", *content.split("\n"), fence]
    return found + _clips(section, level)


def _right(columns: Sequence[findings.Column]) -> set[int]:
    return {place for place, column in enumerate(columns) if column.number}


def _table(section: Section) -> list[str]:
    columns = findings.columns(section)
    heads = [*(cell(column.title) for column in columns), notes.NOTES, notes.ID]
    rows = [
        [
            *(cell(line.cells.get(column.key, "")) for column in columns),
            note_cell(line.note),
            id_cell(line.id),
        ]
        for line in findings.lines(section)
    ]
    return table(heads, rows, _right(columns))


def _code(text: str) -> str:
    """To be copied, where nothing in it would end the code or the cell."""
    return f"`{text}`" if text.isprintable() and not {*"`|"} & {*text} else cell(text)


def _clips(section: Section, level: str) -> list[str]:
    items = listening(section)
    if not items:
        return []
    found = ["", f"{level} Clips", ""]
    names = ", ".join(
        f"{item.number:03d}" + (f" {cell(item.source)}" if item.source else "") for item in items
    )
    found += [f"Items {names}. Input, target and outputs lie in the folders of runs:", ""]
    rows: dict[str, Lane] = {}
    for item in items:
        for lane in item.lanes:
            if lane.id:
                rows.setdefault(lane.id, lane)
    heads = ["variant", "seed", "step", "clips"]
    lines = [
        [
            cell(lane.name),
            str(lane.seed),
            str(lane.step),
            _code(f"{section.path(lane.run, 'clips')}/"),
        ]
        for lane in rows.values()
    ]
    return found + table(heads, lines, {1, 2})
