"""Ear notes: what a person writes into a report's table, read back before it is written anew."""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from bgray.problems import ConfigError

NOTES, ID, NAME = "ear notes", "id", "variant"
"""Heads of the columns that a table with notes has."""
SEAL = re.compile(r"<!-- bgray\.report ([0-9a-f]{16})\b[^\n]*-->")
SAYS = "fill in the ear notes, they stay when the report is made anew; other changes do not"
CONFLICT = re.compile(r"<{7}( |$)|>{7}( |$)")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
WAY_OUT = "mend it, move the file away, or write elsewhere with --to FOLDER; it was left as it is"


@dataclass(frozen=True)
class Note:
    """What a person has written about one variant."""

    id: str
    label: str
    """As the table had it, in Markdown."""
    text: str
    """Markdown, without line breaks."""


@dataclass(frozen=True)
class Written:
    """A report that was there before."""

    notes: dict[str, Note] = field(default_factory=dict)
    """By the id in the row; those that are not empty."""
    ids: frozenset[str] = frozenset()
    """Of all rows that could have had a note."""
    untouched: bool = True
    """Nothing but ear notes (and the width of columns) has changed since it was written."""


def read(content: bytes, where: str) -> Written:
    """Of a REPORT.md; ConfigError with the line where it cannot be understood. An empty file has
    no notes."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _problem(where, line, "is not UTF-8") from None
    if not text.strip():
        return Written()
    found: dict[str, Note] = {}
    ids: set[str] = set()
    tables = 0
    for number, row in _rows(text, where):
        tables += row is None
        if row is None:
            continue
        id, note = unquote(row.get(ID, "").strip("`")), row[NOTES]
        if note and not id:
            said = "has ear notes and no id; a note is one line (write <br> for a new one)"
            raise _problem(where, number, said)
        if id in found and note not in ("", found[id].text):
            said = f"is a second row of {id}, with another note; leave one of them"
            raise _problem(where, number, said)
        ids.add(id)
        if note:
            found[id] = Note(id, row.get(NAME, ""), note)
    if not tables:
        said = f"holds no table with the columns '{NOTES}' and '{ID}'"
        raise _problem(where, 1, said)
    seals = SEAL.findall(text)
    return Written(found, frozenset(ids - {""}), bool(seals) and seals[-1] == _digest(text))


def sealed(text: str) -> str:
    """The report with a last line by which `read` can tell what was changed in it."""
    return f"{text.rstrip()}\n\n<!-- bgray.report {_digest(text)}: {SAYS} -->\n"


def cell(text: str) -> str:
    """Plain text as a cell of a table in Markdown: what could be taken for markup is escaped."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = re.sub(r"[\\`*<|]", r"\\\g<0>", text)
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("](", "]\\(")
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def note_cell(text: str) -> str:
    """A note as a cell: a person's own Markdown, of which only | has to be escaped."""
    return text.replace("|", "\\|")


def id_cell(id: str) -> str:
    """An id as a cell: whatever may stand in the name of a folder, in letters that mean nothing in
    a table."""
    return re.sub(r"[^\w./:@+=,-]", lambda found: quote(found[0], safe="", errors="replace"), id)


def table(heads: list[str], rows: list[list[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table, of cells in Markdown. Not padded: one wide cell would change every row in
    git. right: numbers of the columns that are aligned there."""
    rule = ["--:" if i in right else "---" for i in range(len(heads))]
    return ["| " + " | ".join(row) + " |" for row in (heads, rule, *rows)]


def moved(before: Collection[str], rows: Mapping[str, str]) -> dict[str, str]:
    """Ids of a report that was there before to those of the rows that are the same variants', where
    the report is over other sweeps now, by which the names of all of them may change.

    rows: id to where it comes from: the sweep's folder in full, and behind a / the variant's id. A
    row is the same if that ends like the old id (at least in sweep and variant, if it has both) and
    no other's does.
    """
    free = {id: f"/{place}" for id, place in rows.items() if id not in before}
    fitting: dict[str, list[str]] = {}
    for old in before:
        parts, found = old.split("/"), []
        for count in range(0 if old in rows else len(parts), min(len(parts), 2) - 1, -1):
            end = "/" + "/".join(parts[-count:])
            if found := [id for id, place in free.items() if place.endswith(end)]:
                break
        if len(found) == 1:
            fitting.setdefault(found[0], []).append(old)
    return {olds[0]: new for new, olds in fitting.items() if len(olds) == 1}


# --- a file, line by line


def _problem(where: str, line: int, text: str) -> ConfigError:
    return ConfigError(where, [(f"line {line}", f"{text}; {WAY_OUT}")])


def _lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number, line, whether it is text and not code)."""
    fence = ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        mark = FENCE.match(line)
        inside = bool(fence)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        yield number, line, not (inside or mark)


def _cells(line: str) -> list[str]:
    """Of a row; a | after a backslash is part of its cell, whatever stands before that."""
    line = line.strip()
    line = line[1:] if line.startswith("|") else line
    parts = re.split(r"(?<!\\)\|", line)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    return [part.strip() for part in parts]


def _plain(head: str) -> str:
    return head.strip("*` ").lower()


def _rows(text: str, where: str) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(number of the line, cells by head) of the tables with notes; (number, None) for each
    table's own head."""
    before, heads = "", None
    for number, line, is_text in _lines(text):
        if is_text and CONFLICT.match(line):
            raise _problem(where, number, "is of a merge that is not finished")
        if not is_text or "|" not in line:
            heads, before = None, ""
            continue
        if heads is None:
            names = [_plain(head) for head in _cells(before)] if before else []
            if NOTES in names and RULE.fullmatch(line):
                if ID not in names:
                    said = f"is the head of a table whose column '{ID}' is gone"
                    raise _problem(where, number - 1, said)
                heads = names
                yield number, None
            before = line
            continue
        cells = _cells(line)
        if len(cells) > len(heads):
            said = f"has {len(cells)} cells where the table has {len(heads)} columns (write \\| for"
            raise _problem(where, number, f"{said} a | inside a note)")
        cells += [""] * (len(heads) - len(cells))
        row = dict(zip(heads, cells, strict=True))
        yield number, {**row, NOTES: row[NOTES].replace("\\|", "|")}


def _digest(text: str) -> str:
    """Of everything but ear notes, the widths of columns and the seal."""
    kept: list[str] = []
    heads: list[str] | None = None
    for _, line, is_text in _lines(SEAL.sub("", text)):
        if is_text and line.lstrip().startswith("|"):
            cells = _cells(line)
            if heads is None:
                heads = [_plain(head) for head in cells]
            if RULE.fullmatch(line):
                cells = ["-"] * len(cells)
            elif NOTES in heads and len(kept) and len(cells) > (at := heads.index(NOTES)):
                cells[at] = ""
            line = "|".join(cells)
        else:
            heads = None
        kept.append(line.rstrip())
    return hashlib.sha256("\n".join(kept).strip().encode()).hexdigest()[:16]
