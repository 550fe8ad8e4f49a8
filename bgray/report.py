"""Report: a sweep, or several, as REPORT.md (a table for git), report.html and report.json.

python -m bgray.report RESULTS ... [--to FOLDER]

RESULTS is a sweep's folder or a folder of sweeps, local or s3://. What is written into the table's
column "ear notes" stays when the report is made anew; the sweep may still be running.
"""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bgray import findings, notes, storage
from bgray.config import ConfigError
from bgray.findings import Section
from bgray.notes import Note, Written
from bgray.reading import sweeps
from bgray.train import errors_in_one_line

if TYPE_CHECKING:
    import pandas

TEXT, PAGE, DATA = "REPORT.md", "report.html", "report.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="a sweep's folder, or a folder of sweeps"
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help="write there, with the clips that the page plays"
    )
    args = parser.parse_args(argv)
    with errors_in_one_line(resumes=False):
        for line in write(args.results, args.to):
            print(line, flush=True)


def frame(*folders: str) -> "pandas.DataFrame":
    """Sweeps as a pandas table, for notebooks: a row per trial, in the sweeps' order.

    folders: of sweeps, or folders of sweeps, local or s3://. Columns:
    sweep, variant (its id), label, baseline (whether it is), run (id), seed, state, reason, step
    a column per setting that varies, by its dotted path (`model.kernels`); lists as text
    evaluated_step, and a column per score (`val_stft`): the trial's last evaluation
    matched_step: the step at which its variant is compared with the baseline
    `val_stft_matched`, `val_stft_matched_step`: the trial's mean over the validation items that
      have a value, at the step at which this score is compared (of further scores it may be another
      one), and that step
    verdict: better, worse, same, open, unstable or none; of the baseline nothing
    parameters, and from run.json's timing steps_per_second, data_wait_share (0 to 1),
      train_seconds, time_to_10k_steps (seconds; ..._extrapolated says whether), vram_peak_gib,
      rss_peak_gib, packed (it shared its GPU: times are no figures to compare)
    ear_notes: of the variant, from the REPORT.md of its sweep or of the folder of sweeps

    Compare means of `val_stft_matched` only within one sweep and one such step; intervals and
    verdicts come from bgray.compare. ConfigError where a folder holds no sweep.
    """
    from bgray.report_data import frame_of

    home, places = _places(folders)
    before = _written(home)[0] if home else Written()
    sections, _ = _read(places)
    known = _notes(before, sections, places, home)[0]
    return frame_of([dataclasses.replace(section, notes=known) for section in sections])


def write(folders: Sequence[str], to: str | None = None) -> Iterator[str]:
    """Write the three files; yields a line for each one as it is written, and for what a person
    should know. ConfigError where there is no sweep, or a REPORT.md that is not understood."""
    from bgray.report_clips import shown
    from bgray.report_data import json_of
    from bgray.report_page import page_of
    from bgray.report_text import text_of

    home, places = _places(folders)
    home = to.rstrip("/") if to else home
    if home is None:
        text = "have no folder in common; say where the report is to be written: --to FOLDER"
        raise ConfigError(" ".join(folders), [("", text)])
    _written(home)  # before anything takes time
    sections, remarks = _read(places)
    yield from remarks
    for section in sections:
        if not findings.is_over(section.results):
            yield f"{section.results.url}: {findings.standing(section.results)}"

    # Read again right before it is written: somebody may be typing notes.
    before, content = _written(home)
    known, left, remarks = _notes(before, sections, places, home)
    yield from remarks
    sections = [dataclasses.replace(section, notes=known) for section in sections]
    text = text_of(sections, left).encode()
    url = storage.join(home, TEXT)
    if content is not None and not before.untouched:
        kept = _free(home)
        storage.write_bytes(kept, content)
        yield f"{kept}: {TEXT} as it was, for more than ear notes had been changed in it"
    storage.write_bytes(url, text)
    variants = sum(len(section.results.entries) for section in sections)
    number = len(known) + len(left)
    yield f"{url}: {_counted(variants, 'variant')}, {_counted(number, 'ear note')}" + (
        f", {len(left)} of variants that are gone" if left else ""
    )

    page = page_of(sections)
    url = storage.join(home, PAGE)
    storage.write_bytes(url, page)
    clips = shown(sections)
    sounds = sum(path.endswith(".wav") for path in clips)
    yield f"{url}: {len(page) / 1e6:.1f} MB, {_counted(sounds, 'clip')} linked"
    places = [storage.join(home, s.folder) if s.folder else home for s in sections]
    away = [*map(_absolute, places)] != [_absolute(s.results.url) for s in sections]
    if away and clips:
        yield _copy(clips, home)
    url = storage.join(home, DATA)
    storage.write_bytes(url, json_of(sections, clips.keys() if away else None))
    yield f"{url}: everything unrounded"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- which sweeps, and where the report goes

Place = tuple[str, str]
"""(a sweep's folder, its name in the report: empty where it is the only one)."""


def _places(folders: Sequence[str]) -> tuple[str | None, list[Place]]:
    """(the folder they have in common, sweeps); None where there is none."""
    given = list(dict.fromkeys(folder.rstrip("/") or "/" for folder in folders))
    found: dict[str, str] = {}  # absolute url: as given
    parents = []
    for folder in given:
        _there(folder)
        inside = sweeps(folder)
        parents.append(_absolute(folder if inside != [folder] else _parent(folder)))
        found |= {_absolute(url): url for url in inside if _absolute(url) not in found}
    if len(given) == 1 and list(found.values()) == given:
        return given[0], [(given[0], "")]
    home = _common(parents)
    if home is None:
        return None, list(zip(found.values(), _names(list(found)), strict=True))
    places = [(url, absolute[len(home) + 1 :]) for absolute, url in found.items()]
    return (given[0] if len(given) == 1 else home), places


def _names(urls: Sequence[str]) -> list[str]:
    """As much of the end of each as tells them apart; where all of it does not (a bucket and a
    folder of one name), numbered."""
    parts = [
        [part for part in url.partition("://")[2 * ("://" in url)].split("/") if part]
        for url in urls
    ]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len({*names}) == len(names):
            return names
    return [f"{number}/{name}" for number, name in enumerate(names, 1)]


def _there(folder: str) -> None:
    """ConfigError, with the nearest name, where there is no such local folder."""
    if storage.is_remote(folder) or os.path.isdir(folder):
        return
    parent, name = os.path.split(os.path.abspath(folder))
    names = storage.listdir(parent)
    near = difflib.get_close_matches(name, names, 1)
    text = "is no folder" + (f"; did you mean '{near[0]}'?" if near else "")
    raise ConfigError(folder, [("", text + "; give a sweep's folder, or one of sweeps")])


def _absolute(url: str) -> str:
    return url if storage.is_remote(url) else os.path.abspath(url)


def _parent(url: str) -> str:
    absolute = _absolute(url)
    return absolute.rpartition("/")[0] or "/"


def _common(urls: Sequence[str]) -> str | None:
    """The deepest folder that holds all of them; None where that is nobody's: /, or all of S3."""
    parts = [url.split("/") for url in urls]
    same = os.path.commonprefix(parts)  # of lists, element by element
    found = "/".join(same)
    return found if found.strip("/") and not found.endswith((":", "://", ":/")) else None


def _read(places: Sequence[Place]) -> tuple[list[Section], list[str]]:
    """(sections, lines about sweeps that could not be read); ConfigError where none could."""
    sections, remarks, errors = [], [], []
    for url, name in places:
        try:
            sections.append(findings.read(url, name))
        except ConfigError as error:
            errors.append(error)
            remarks.append(f"left out: {' '.join(str(error).split())}")
    if not sections:
        raise errors[0]
    return sections, remarks


# --- notes, clips


def _written(home: str) -> tuple[Written, bytes | None]:
    url = storage.join(home, TEXT)
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError:
        return Written(), None
    return notes.read(content, url), content


def _notes(
    before: Written, sections: Sequence[Section], places: Sequence[Place], home: str | None
) -> tuple[dict[str, str], list[Note], list[str]]:
    """(notes by id of the row, those that have no row any more, lines a person should read).

    A row that the report has not had yet begins with the note in its sweep's own report.
    """
    rows = {
        section.id(id): f"{_absolute(section.results.url)}/{id}"
        for section in sections
        for id in findings.ids(section)
    }
    moved = notes.moved(before.ids, rows)
    had = {moved.get(id, id) for id in before.ids}
    found, left, remarks = {}, [], []
    for id, note in before.notes.items():
        new = moved.get(id, id)
        if new not in rows:
            left.append(note)
            continue
        found[new] = note.text
        if new != id:
            remarks.append(f"{new}: has the ear note that was at {id}")
    for url, name in places:
        if home is not None and _absolute(url) == _absolute(home):
            continue
        try:
            theirs = _written(url)[0].notes
        except ConfigError as error:
            remarks.append(f"its ear notes are left out: {' '.join(str(error).split())}")
            continue
        for note in theirs.values():
            id, where = f"{name}/{note.id}" if name else note.id, storage.join(url, TEXT)
            if id not in rows:
                continue
            if id not in had:
                found[id] = note.text
            elif id not in found:
                remarks.append(f"{id}: the ear note in {where} is left out, this row has had none")
            elif found[id] != note.text:
                remarks.append(f"{id}: another ear note in {where}; the one here is kept")
    return found, left, remarks


def _free(home: str) -> str:
    """A name for the old report that is not taken."""
    taken, number = set(storage.listdir(home)), 1
    while (name := f"REPORT.old{f'.{number}' * (number > 1)}.md") in taken:
        number += 1
    return storage.join(home, name)


def _copy(clips: dict[str, str], home: str) -> str:
    """Each clip to where the page looks for it."""
    size = 0
    for path, url in clips.items():
        content = storage.read_bytes(url)
        size += len(content)
        if _absolute(storage.join(home, path)) != _absolute(url):
            storage.write_bytes(storage.join(home, path), content)
    sounds = sum(path.endswith(".wav") for path in clips)
    number = _counted(sounds, "clip")
    if pictures := len(clips) - sounds:
        number += f" and {_counted(pictures, 'picture')}"
    return f"{home}: {number} copied beside them, {size / 1e6:.1f} MB"


if __name__ == "__main__":
    from bgray.report import main

    main()
