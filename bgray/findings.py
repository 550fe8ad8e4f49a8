"""What a report says of a sweep, whether as text, page or data: rows, how far it is, what went
wrong, what a person would log of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bgray import cells
from bgray.answers import Heard, Ranked, results_of
from bgray.reading import Reader
from bgray.results import Entry, Results, Trial

UNPROCESSED, INPUT = "unprocessed input", "input"
"""Its row's label and id."""
SHARED = " on a shared GPU"
WIDE = 3
"""So many scores fit beside everything else; further ones get a table of their own."""


@dataclass(frozen=True)
class Section:
    """One sweep in a report."""

    results: Results
    folder: str = ""
    """The sweep's, from where the report lies; empty: the very same."""
    heard: Heard | None = None
    """What blind tests have shown; None where there were none."""
    notes: dict[str, str] = field(default_factory=dict)
    """Ear notes by id of the row."""

    @property
    def entries(self) -> list[Entry]:
        """In the order of the sweep's YAML: rows that jump with every rank cannot be compared."""
        found = sorted(self.results.entries, key=lambda entry: entry.number)
        return [
            replace(
                entry,
                changes=tuple(
                    replace(c, before=ends(c.before), after=ends(c.after)) for c in entry.changes
                ),
            )
            for entry in found
        ]

    def id(self, of: str) -> str:
        """Of a variant's row: its id; in a report over several sweeps what bgray.compare takes."""
        return f"{self.folder}/{of}" if self.folder else of

    def note(self, of: str) -> str:
        return self.notes.get(self.id(of), "")

    def path(self, *parts: str) -> str:
        """From where the report lies."""
        return "/".join([*([self.folder] if self.folder else []), *parts])


def read(url: str, folder: str = "") -> Section:
    """A sweep's folder, local or s3://. ConfigError where there is nothing to report."""
    heard = results_of(url)
    listened = bool(heard.sessions or heard.damaged)
    return Section(Reader(url).read(), folder, heard if listened else None)


# --- the table


@dataclass(frozen=True)
class Column:
    key: str
    """In `cells.of`, or `rank`."""
    title: str
    number: bool = False


def columns(section: Section, *, more: bool = False) -> list[Column]:
    """Of the table of variants but for ear notes and id; more: of the table of further scores."""
    scores = list(section.results.scores)
    shown = scores[WIDE:] if more else scores[:WIDE]
    found = [Column("variant", "variant")]
    if not more:
        found += [Column("changes", "changes"), Column("seeds", "seeds", True)]
        found += [Column("step", "at step", True)]
    for score in shown:
        found.append(Column(score, score, True))
        found.append(Column(f"{score} difference", f"{score}: difference", True))
        found.append(Column(f"{score} baseline", f"{score}: baseline there", True))
    if more:
        return found
    found += [Column("vram", "VRAM", True), Column("parameters", "parameters", True)]
    found += [Column("to_10k", "10k steps", True), Column("wait", "data wait", True)]
    if section.heard and section.heard.ranked:
        found.append(Column("rank", "blind rank", True))
    return [*found, Column("states", "state"), Column("verdict", "verdict")]


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    id: str
    """As `Section.id`."""
    cells: dict[str, str]
    """By key of the column; what is missing says nothing."""
    order: dict[str, float]
    """What numbers are sorted by, where there is one."""
    note: str


def ids(section: Section) -> list[str]:
    """Of the rows, without the sweep's name."""
    return [*(entry.id for entry in section.entries), *[INPUT] * bool(section.results.unprocessed)]


def lines(section: Section) -> list[Line]:
    """Variants, then the unprocessed input."""
    results, found = section.results, []
    ranks: dict[str, list[Ranked]] = {}
    for one in section.heard.ranked if section.heard else ():
        ranks.setdefault(one.variant, []).append(one)
    for entry in section.entries:
        text = cells.of(results, entry)
        if entry.control:
            text["variant"] += " (control)"
        order = _order(results, entry)
        _rank(ranks.get(entry.id), text, order)
        found.append(Line(section.id(entry.id), text, order, section.note(entry.id)))
    if results.unprocessed:
        text = {score: f"{v:.4f}" for score, v in results.unprocessed.items() if v is not None}
        text["variant"] = UNPROCESSED
        order = {score: float(v) for score, v in results.unprocessed.items() if v is not None}
        _rank(ranks.get(INPUT), text, order)
        found.append(Line(section.id(INPUT), text, order, section.note(INPUT)))
    return found


def _rank(ranked: list[Ranked] | None, text: dict[str, str], order: dict[str, float]) -> None:
    """Write what blind rankings said into a line: of each source."""
    if ranked:
        words = (f"{one.mean_rank:.2f} ({one.answers}) {one.source or ''}" for one in ranked)
        text["rank"] = ", ".join(word.rstrip() for word in words)
        order["rank"] = ranked[0].mean_rank


def _order(results: Results, entry: Entry) -> dict[str, float]:
    found = cells.numbers(results, entry)
    for score, one in entry.rows.items():
        found[score] = one.mean
        found[f"{score} baseline"] = one.baseline_mean
        found[f"{score} difference"] = one.parts.mean if one.parts else None
    return {key: float(value) for key, value in found.items() if value is not None}


def legend(section: Section) -> str:
    """What marks in the column of times mean; empty where there are none."""
    texts = [entry.time_to_10k_text for entry in section.entries]
    marks = {"~": "~ extrapolated", "(": "( ) shared its GPU, not to be compared"}
    found = [said for mark, said in marks.items() if any(mark in text for text in texts)]
    return f"10k steps: {'; '.join(found)}" if found else ""


# --- how far it is, and what went wrong


def standing(results: Results) -> str:
    """`12 trials: 10 finished, 2 stopped`; while it runs `3 of 12 trials still running, as of step
    400 to 900, 2 waiting; 7 finished`."""
    counts, total = results.states, len(results.trials)
    trials = f"{total} trial{'s' * (total != 1)}"
    over = {state: n for state, n in counts.items() if state not in ("running", "waiting")}
    rest = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in sorted(over.items()))
    parts = []
    if running := [t for t in results.trials.values() if t.state == "running"]:
        steps = cells.span(results.progress(trial) for trial in running)
        parts.append(f"{len(running)} of {trials} still running, as of step {steps}")
    if waiting := counts["waiting"]:
        parts.append(f"{waiting} waiting" if parts else f"{waiting} of {trials} waiting")
    if not parts:
        return f"{trials}: {rest}" if rest else f"{trials}"
    dead = " (nobody works on them: the same command goes on)"
    stands = dead if results.driver.state != "running" and not running else ""
    return ", ".join(parts) + stands + (f"; {rest}" if rest else "")


def is_over(results: Results) -> bool:
    return not (results.states["running"] or results.states["waiting"])


def method(results: Results) -> str:
    """How the intervals come about; or why nothing is compared."""
    comparison = results.comparisons.get(results.metric or "")
    if comparison is not None:
        return comparison.method()
    return f"nothing is compared: {results.why_not or 'no trial has been evaluated yet'}"


def against(results: Results) -> str:
    """`val_stft (lower is better) against kernel 7`."""
    if results.metric is None:
        return "nothing has been evaluated yet"
    way = "lower" if results.scores[results.metric] == "min" else "higher"
    base = results.baseline
    return f"{results.metric} ({way} is better)" + (f" against {base.label}" if base else "")


def aim(results: Results) -> str:
    """In a sentence, what decides."""
    how = "Compared" if results.population is None else "Members are chosen"
    return f"{how} by {against(results)}"


def unfinished(section: Section) -> list[tuple[Trial, str]]:
    """Trials that ended before their time, with how and why; the sweep's order."""
    found = []
    for entry in section.entries:
        for trial in entry.trials:
            if trial.state in ("finished", "running", "waiting"):
                continue
            text = f"{trial.state.replace('_', ' ')} at step {trial.step}"
            reason = local(trial.reason).removeprefix(f"at step {trial.step}: ")
            found.append((trial, f"{text}: {reason}" if reason else text))
    return found


def warned(section: Section) -> list[tuple[str, list[Trial]]]:
    """Each warning with the trials that have it."""
    found: dict[str, list[Trial]] = {}
    for entry in section.entries:
        for trial in entry.trials:
            for text in trial.info.get("warnings") or ():
                found.setdefault(local(str(text)), []).append(trial)
    return list(found.items())


def problems(results: Results) -> list[str]:
    """Files that could not be read."""
    return [local(str(text).replace(f"{results.url}/", "")) for text in results.problems]


def local(text: str) -> str:
    """In one line, of absolute paths only the end: they differ from machine to machine."""
    text = " ".join(str(text).split())
    return re.sub(r"(?<![\w:/.])/(?:[^\s/:,;'\"]+/)+(?=[^\s/]+/[^\s/]+)", ".../", text)


def ends(setting: Any) -> Any:
    """A setting, of absolute paths in it only the end."""
    if isinstance(setting, dict):
        return {key: ends(value) for key, value in setting.items()}
    if isinstance(setting, list | tuple):
        return [ends(value) for value in setting]
    if not isinstance(setting, str) or not setting.startswith("/"):
        return setting
    parts = setting.strip("/").split("/")
    return setting if len(parts) < 3 else "/".join(["...", *parts[-2:]])


def who(trials: Sequence[Trial]) -> str:
    """`kernel 7 (seeds 0, 1), kernel 41 (seed 0)`."""
    seeds: dict[str, list[int]] = {}
    for trial in trials:
        seeds.setdefault(trial.label, []).append(trial.seed)
    return ", ".join(
        f"{label} (seed{'s' * (len(s) > 1)} {', '.join(map(str, s))})" for label, s in seeds.items()
    )


# --- a line of a log


def log_entry(section: Section, entry: Entry) -> list[str]:
    """What a person types into a log about a variant, measured."""
    results, text = section.results, cells.of(section.results, entry)
    found = [f"{one_line(entry.label)}{' (baseline)' if _is_base(results, entry) else ''}"]
    if results.population is None:
        found += [f"  {one_line(change.text())}" for change in entry.changes]
    elif text["changes"] != cells.NOTHING:
        found.append(f"  {one_line(text['changes'])}")
    if entry.parameters is not None:
        found.append(f"  # params: {text['parameters']}")
    timing, cost = entry.time_to_10k, []
    if timing:
        cost.append(f"took {text['to_10k']} to train 10k steps")
    if (rate := timing.get("steps_per_second")) is not None:
        cost.append(f"{rate:.1f} it/s{SHARED if timing.get('packed') else ''}")
    if entry.vram_gib is not None:
        cost.append(f"used {text['vram']} of vram")
    if (wait := entry.data_wait_share) is not None:
        said = f"{wait:.0%} of the time waiting for data"
        cost.append(said + (SHARED if entry.data_wait_shared else ""))
    if cost:
        found.append(f"  {', '.join(cost)}")
    for score in results.scores:
        if results.population is not None and text[score] != cells.NOTHING:
            found.append(f"  {score} {text[score]}, step {text['step']}")
        if (row := entry.rows.get(score)) is None or row.mean is None:
            continue
        line = f"  {score} {cells.mean(row)}"
        if row.parts is not None and row.verdict is not None:
            base = text[f"{score} baseline"]
            line += f", {text[f'{score} difference']} from the baseline's {base}"
        number = len(row.seeds)
        there = f", {number} seed{'s' * (number != 1)}" if number != len(entry.trials) else ""
        found.append(f"{line}, step {row.step}{there}")
    seeds, states = len(entry.trials), text["states"]
    if seeds > 1 and len(entry.states) == 1:
        states = f"all {states.partition(' ')[2]}"
    found.append(f"  {seeds} seed{'s' * (seeds != 1)}, {states}")
    if text["verdict"] not in (cells.BASELINE, cells.NOTHING):
        found.append(f"  -> {text['verdict']}")
    return found


def _is_base(results: Results, entry: Entry) -> bool:
    base = results.baseline
    return base is not None and base.id == entry.id


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# --- populations


def schedule(section: Section) -> list[str]:
    """Of a population (pbt): with what the best member's weights were trained; none before its
    end."""
    results = section.results
    found = (results.population or {}).get("found") or {}
    try:
        names = {id: trial.label for id, trial in results.trials.items()}
        lines = []
        for item in found.get("schedule", ()):
            values = ", ".join(f"{path} {value}" for path, value in item["values"].items())
            lines.append(f"From step {item['step']}: {values} ({names[item['member']]})")
        if lines:
            said = f"{names[found['winner']]}, the best of {len(results.trials)} members, came by "
            said += "this schedule. Its score looks better than it is: it was chosen by that score"
            lines.insert(0, said)
    except (KeyError, TypeError, AttributeError):
        return ["The schedule in sweep.json is not understood"]
    return lines


# --- blind tests


def heard_lines(section: Section) -> list[str]:
    """What blind tests have shown, in sentences; none where there were none."""
    heard = section.heard
    if heard is None:
        return []
    found, best = [], {one.where: one for one in reversed(heard.ranked)}
    for where, one in reversed(best.items()):
        found.append(
            f"Blind ranking{' ' * bool(where)}{where}: {one.label} is placed best, mean rank "
            f"{one.mean_rank:.2f} over {one.answers} ranking{'s' * (one.answers != 1)}"
        )
    found += [f"ABX of {pair.text}" for pair in heard.pairs]
    found += [f"Ears and {one.metric}: rank correlation {one.text}" for one in heard.agreements]
    return found + [f"Skipped: {text}" for text in heard.damaged]
