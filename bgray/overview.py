"""A sweep as plain data for the page: its state in chips, its variants as rows of a table."""

import math
from typing import Any

from bgray import cells, figures, storage
from bgray.listening import Heard
from bgray.problems import ConfigError
from bgray.results import Entry, Results, Trial

ORDER = ("finished", "running", "waiting", "stopped", "interrupted")
ENDED_BADLY = ("failed", "diverged", "out_of_memory", "damaged", "interrupted")
RAY_SESSION = ".ray/session.json"
SCORES_SHOWN = 2  # of more, the page hides the others until it is asked
COSTS = ("vram", "parameters", "to_10k", "wait")
VERDICTS = ("better", "same", "open", "none", "unstable", "worse")

Number = int | float | str | None
Column = dict[str, Any]

FIXED: dict[str, tuple[str, str, bool]] = {
    "variant": ("variant", "Its label in the sweep's YAML", False),
    "changes": ("differs in", "Settings: the baseline's → this one's", False),
    "seeds": ("seeds", "How many seeds are compared", True),
    "step": ("at step", "The last step that the variant and the baseline both reached", True),
    "vram": ("VRAM", "Peak, the most that a seed of it held", True),
    "parameters": ("params", "Of the model", True),
    "to_10k": (
        "10k steps",
        "Training time; ~ extrapolated, in brackets: on a GPU that was shared",
        True,
    ),
    "wait": ("wait", "Share of the time spent waiting for data", True),
    "verdict": ("verdict", "By the first score, over all seeds and validation items", False),
}


def described(results: Results, heard: Heard) -> dict[str, Any]:
    """What the page draws; all text is plain, to be escaped there."""
    comparison = results.comparisons.get(results.metric or "")
    return {
        "name": results.name,
        "url": results.url,
        "metric": results.metric,
        "mode": results.scores.get(results.metric or ""),
        "method": comparison.method() if comparison else "",
        "why_not": "" if comparison else results.why_not,
        "problems": results.problems,
        "chips": chips(results),
        "driver": driver(results),
        "changed": max((t.changed for t in results.trials.values() if t.changed), default=None),
        "ray": ray_dashboard(results) if results.driver.state == "running" else None,
        "columns": columns(results, heard),
        "rows": [row(results, entry, heard) for entry in results.entries],
        "unprocessed": {s: f"{v:.4f}" for s, v in results.unprocessed.items() if v is not None},
        "curves": results.curve_names(),
        "heard": ears(heard),
    }


def chips(results: Results) -> list[dict[str, Any]]:
    """How many trials are in each state: those that went well first."""
    counts = results.states
    known = [*ORDER, *sorted(set(counts) - set(ORDER))]
    return [{"state": state, "count": counts[state]} for state in known if counts[state]]


def driver(results: Results) -> dict[str, str]:
    """Whether a command works on the sweep, and how to go on where none does."""
    who = results.driver.who
    unfinished = sum(results.states[s] for s in ("running", "waiting", "interrupted", "failed"))
    command = str(who.get("command") or "python -m bgray.sweep SWEEP.yaml")
    place = f" on {who['host']}" if who.get("host") else ""
    if results.driver.state == "running":
        text, pid = f"driver runs{place}", who.get("pid")
        return {"state": "running", "text": text + (f" (process {pid})" if pid else "")}
    if results.driver.state == "dead":
        return {"state": "dead", "text": f"driver{place} has died; go on with", "command": command}
    if unfinished:
        text = f"no driver; {unfinished} of {len(results.trials)} trials are not finished, go on "
        text += "with the same command"
        return {"state": "none", "text": text}
    return {"state": "done", "text": "done"}


def ray_dashboard(results: Results) -> str | None:
    """The address of Ray's own dashboard, which the driver leaves in the sweep's folder."""
    try:
        session = storage.read_json(storage.join(results.url, RAY_SESSION)) or {}
    except (ConfigError, OSError):
        return None
    address = session.get("ray_dashboard")
    return address if str(address).startswith(("http://", "https://")) else None


def columns(results: Results, heard: Heard) -> list[Column]:
    """key, title, tip, whether numbers; of a score `score` and `mode` too, and whether it is
    `extra`: hidden until asked for."""

    def fixed(*keys: str) -> list[Column]:
        return [
            {"key": key, "title": title, "tip": tip, "number": number}
            for key in keys
            for title, tip, number in [FIXED[key]]
        ]

    scores: list[Column] = []
    for place, (score, mode) in enumerate(results.scores.items()):
        way = "lower is better" if mode == "min" else "higher is better"
        tip = f"{way}. Difference to the baseline with its interval; below it the mean over seeds "
        tip += "± their standard deviation, and the baseline's mean at the same step"
        one = {"key": score, "title": score, "tip": tip, "number": True, "score": score}
        extra = len(results.scores) > SCORES_SHOWN + 1 and place >= SCORES_SHOWN
        scores.append({**one, "mode": mode, "extra": extra})
    ears: list[Column] = []
    if heard.ranked or heard.pairs:
        tip = "Mean place in blind rankings, 0 best to 1 worst; ABX: right answers of all"
        ears = [{"key": "ears", "title": "ears", "tip": tip, "number": True}]
    # What decides comes first; what it costs may be off the right edge of a small screen.
    first, last = fixed("variant", "changes", "seeds", "step"), fixed(*COSTS)
    return [*first, *scores, *fixed("verdict"), *ears, *last]


def row(results: Results, entry: Entry, heard: Heard) -> dict[str, Any]:
    """One variant: its cells' text, what to sort them by, how its trials stand."""
    first = entry.rows.get(results.metric or "")
    verdict = first.verdict if first else None
    style = figures.style(entry.number)
    text, numbers = heard_of(entry.id, heard)
    return {
        "id": entry.id,
        "label": entry.label,
        "colour": style.colour,
        "symbol": style.symbol,
        "control": entry.control,
        "baseline": results.baseline is not None and entry.id == results.baseline.id,
        "kind": verdict.kind if verdict else None,
        "cells": {**cells.of(results, entry), "ears": text},
        "sort": {**sort_keys(results, entry), "ears": numbers},
        "trials": [trial(results, one) for one in entry.trials],
    }


def trial(results: Results, one: Trial) -> dict[str, Any]:
    found = {"id": one.id, "seed": one.seed, "state": one.state, "clips": bool(one.clips)}
    found["bad"] = one.state in ENDED_BADLY
    if one.state not in ("finished", "waiting"):
        found["step"], found["steps"] = results.progress(one), one.info.get("steps")
        found["reason"] = one.reason
    warnings = len(one.info.get("warnings") or [])
    return {**found, "warnings": warnings} if warnings else found


def sort_keys(results: Results, entry: Entry) -> dict[str, Number]:
    """What the page sorts rows by, by column; None, which comes last, where nothing is known."""
    first = entry.rows.get(results.metric or "")
    kind = first.verdict.kind if first and first.verdict else None
    found: dict[str, Number] = {
        "variant": entry.label.lower(),
        "changes": ", ".join(change.text() for change in entry.changes).lower(),
        **cells.numbers(results, entry),
        "verdict": VERDICTS.index(kind) if kind in VERDICTS else None,
    }
    for score, one in entry.rows.items():
        # By the difference, not the mean: rows may stand at different steps.
        found[score] = one.parts.mean if one.parts else (0.0 if one.verdict is None else None)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


# --- what ears have said


def heard_of(variant: str, heard: Heard) -> tuple[str, float | None]:
    """(a cell's text, what to sort by)."""
    ranked = [one for one in heard.ranked if one.variant == variant]
    words = [f"{one.place:.2f} ({one.answers})" + _source(one.source) for one in ranked]
    for pair in heard.pairs:
        if variant in pair.variants and pair.trials:
            words.append(f"ABX {pair.right}/{pair.trials}" + _source(pair.source))
    return ", ".join(words) or cells.NOTHING, ranked[0].place if ranked else None


def _source(name: str | None) -> str:
    return f" {name}" if name else ""


def ears(heard: Heard) -> list[str]:
    """Lines below the table."""
    lines = [f"ABX of {pair.text}" for pair in heard.pairs]
    lines += [f"ears against {one.metric}: {one.text}" for one in heard.agreements]
    return [*lines, *(f"left out: {text}" for text in heard.damaged)]
