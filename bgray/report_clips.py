"""Which clips and pictures a report shows: each variant's where it is compared, and beside it the
baseline's at that step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from bgray import storage
from bgray.clips import files
from bgray.findings import Section
from bgray.results import Entry, Trial


@dataclass(frozen=True)
class Lane:
    """One sound of a listening item."""

    name: str
    """`input`, `target`, or the variant's label."""
    run: str
    file: str
    id: str = ""
    """The variant's; empty for input and target."""
    seed: int | None = None
    step: int | None = None
    matched: bool = True
    """The step is the one at which the variant is compared."""
    beside: tuple[str, str] | None = None
    """(run, file) of the baseline at this step, where its own lane is at another one."""

    @property
    def paths(self) -> list[tuple[str, str]]:
        return [(self.run, self.file), *([self.beside] if self.beside else [])]


@dataclass(frozen=True)
class Item:
    """The same few seconds, by everyone."""

    number: int
    source: str | None
    """Which of a separation's; None where there is one."""
    lanes: tuple[Lane, ...]


def listening(section: Section) -> list[Item]:
    """Input, target and each variant at the step at which it is compared, of its first seed that
    is compared and has clips."""
    there: dict[str, dict[Any, str]] = {}
    chosen: list[tuple[Entry, Trial]] = []
    for entry in section.entries:
        row = entry.rows.get(section.results.metric or "")
        first = row.seeds if row else ()
        for trial in sorted(entry.trials, key=lambda t: (t.seed not in first, t.seed)):
            found = files(cast(Any, trial))  # it asks for no more than its clips
            if any(isinstance(at, int) for _, at, _ in found):
                there[trial.id] = found
                chosen.append((entry, trial))
                break
    items = sorted({(i, s or "") for f in there.values() for i, at, s in f if isinstance(at, int)})
    return [_item(section, number, source or None, chosen, there) for number, source in items]


def _item(
    section: Section,
    number: int,
    source: str | None,
    chosen: list[tuple[Entry, Trial]],
    there: dict[str, dict[Any, str]],
) -> Item:
    lanes, outputs = [], []
    base = section.results.baseline
    for entry, trial in chosen:
        steps = _steps(there[trial.id], number, source)
        if not steps:
            continue
        row = entry.rows.get(section.results.metric or "")
        wanted = row.step if row and row.step is not None else None
        before = [step for step in steps if wanted is None or step <= wanted] or steps[:1]
        outputs.append((entry, trial, before[-1], wanted is None or before[-1] == wanted))
    own = next((o for o in outputs if base is not None and o[0].id == base.id), None)
    for kind in ("input", "target"):
        for _, trial, _, _ in outputs:
            name = there[trial.id].get((number, kind, None if kind == "input" else source))
            if name:
                lanes.append(Lane(kind, trial.id, name))
                break
    for entry, trial, step, matched in outputs:
        beside = None
        if own is not None and step != own[2]:
            name = there[own[1].id].get((number, step, source))
            beside = (own[1].id, name) if name else None
        name = there[trial.id][number, step, source]
        lanes.append(Lane(entry.label, trial.id, name, entry.id, trial.seed, step, matched, beside))
    return Item(number, source, tuple(lanes))


def _steps(found: dict[Any, str], number: int, source: str | None) -> list[int]:
    return sorted(a for i, a, s in found if isinstance(a, int) and (i, s) == (number, source))


# --- their files


def picture(trial: Trial, file: str) -> str | None:
    """Of the same as a sound, where the run has one (piano rolls)."""
    name = file.removesuffix(".wav") + ".png"
    return name if name in trial.clips else None


def shown(sections: Sequence[Section]) -> dict[str, str]:
    """Path from the report to url, of the sounds and pictures that the page needs."""
    found = {}
    for section in sections:
        for run, file in (p for i in listening(section) for lane in i.lanes for p in lane.paths):
            for name in (file, picture(section.results.trials[run], file)):
                if name is not None:
                    url = storage.join(section.results.url, run, "clips", name)
                    found[section.path(run, "clips", name)] = url
    return found
