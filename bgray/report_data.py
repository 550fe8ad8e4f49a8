"""report.json, and a report as a pandas table: everything unrounded."""

import json
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bgray import findings
from bgray.findings import Section
from bgray.results import Entry, Trial, as_text

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
"""Counted up when a name in report.json gets another meaning or goes."""
COSTS = (
    "steps_per_second",
    "data_wait_share",
    "train_seconds",
    "time_to_10k_steps",
    "time_to_10k_steps_extrapolated",
    "vram_peak_gib",
    "rss_peak_gib",
    "packed",
)
"""Of run.json's timing; a column each of the table. Seconds, GiB, shares from 0 to 1."""


def json_of(sections: Sequence[Section], copied: Collection[str] | None = None) -> bytes:
    """The whole file; NaN and infinities are null.

    copied: paths of the clips that are where the report is; None: all of them.
    """
    raw = {"schema": SCHEMA, "sweeps": [_sweep(section, copied) for section in sections]}
    return json.dumps(clean(raw), indent=1, allow_nan=False).encode() + b"\n"


def clean(value: Any) -> Any:
    """Plain JSON data."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _sweep(section: Section, copied: Collection[str] | None) -> dict[str, Any]:
    results = section.results
    comparisons = results.comparisons
    return {
        "name": results.name,
        "folder": section.folder or ".",
        "metric": results.metric,
        "scores": results.scores,
        "baseline": results.baseline.id if results.baseline else None,
        "states": dict(results.states),
        "over": findings.is_over(results),
        "rungs": results.rungs,
        "varying": results.varying,
        "unprocessed": results.unprocessed,
        "comparisons": {metric: one.to_json() for metric, one in comparisons.items()},
        "population": results.population,
        "not_compared": None if comparisons else results.why_not,
        "notes": {findings.INPUT: section.note(findings.INPUT)},
        "problems": findings.problems(results),
        "variants": [_variant(section, entry, copied) for entry in section.entries],
        "listening": section.heard.to_json() if section.heard else None,
    }


def _variant(section: Section, entry: Entry, copied: Collection[str] | None) -> dict[str, Any]:
    timing = entry.time_to_10k
    return {
        "id": entry.id,
        "label": entry.label,
        "control": entry.control,
        "ear_notes": section.note(entry.id),
        "settings": findings.ends(section.results.settings(entry)),
        "changes": {c.key: {"baseline": c.before, "here": c.after} for c in entry.changes},
        "states": dict(entry.states),
        "parameters": entry.parameters,
        "vram_peak_gib": entry.vram_gib,
        "data_wait_share": entry.data_wait_share,
        "data_wait_is_of_a_shared_gpu": entry.data_wait_shared,
        "time_to_10k_steps": timing.get("time_to_10k_steps"),
        "time_to_10k_steps_extrapolated": timing.get("time_to_10k_steps_extrapolated"),
        "time_is_of_a_shared_gpu": timing.get("packed"),
        "trials": [_trial(section, trial, copied) for trial in entry.trials],
    }


def _trial(section: Section, trial: Trial, copied: Collection[str] | None) -> dict[str, Any]:
    info = trial.info
    attempts = info.get("attempts") or [{}]
    clips = [section.path(trial.id, "clips", name) for name in trial.clips]
    keys = ("host", "platform", "gpu", "commit", "packages")
    return {
        "id": trial.id,
        "seed": trial.seed,
        "state": trial.state,
        "reason": findings.local(trial.reason) or None,
        "step": section.results.progress(trial),
        "steps": info.get("steps"),
        "metrics": info.get("metrics") or None,
        "converged": info.get("converged"),
        "warnings": [findings.local(w) for w in info.get("warnings") or ()],
        "guards": info.get("guards") or {},
        "timing": info.get("timing") or {},
        "parameters": info.get("parameters"),
        "attempts": len(info.get("attempts") or ()),
        **{key: attempts[-1].get(key) for key in keys},
        "clips": [path for path in clips if copied is None or path in copied],
    }


def frame_of(sections: Sequence[Section]) -> "pandas.DataFrame":
    """A row per trial, as `bgray.report.frame` documents."""
    import pandas

    varying = list(dict.fromkeys(key for s in sections for key in s.results.varying))
    scores = list(dict.fromkeys(score for s in sections for score in s.results.scores))
    rows = [
        _row(section, entry, trial, varying, scores)
        for section in sections
        for entry in section.entries
        for trial in entry.trials
    ]
    return pandas.DataFrame(rows, columns=pandas.Index(list(rows[0])) if rows else None)


def _row(
    section: Section, entry: Entry, trial: Trial, varying: Sequence[str], scores: Sequence[str]
) -> dict[str, Any]:
    results, info = section.results, trial.info
    row = entry.rows.get(results.metric or "")
    matched = {s: one.step if (one := entry.rows.get(s)) else None for s in scores}
    settings = results.settings(entry)
    last, timing = info.get("metrics") or {}, info.get("timing") or {}
    return {
        "sweep": section.folder or results.name,
        "variant": entry.id,
        "label": entry.label,
        "baseline": results.baseline is not None and entry.id == results.baseline.id,
        "run": trial.id,
        "seed": trial.seed,
        "state": trial.state,
        "reason": findings.local(trial.reason),
        "step": results.progress(trial),
        **{key: _value(settings.get(key)) for key in varying},
        "evaluated_step": last.get("step"),
        **{score: last.get(score) for score in scores},
        "matched_step": row.step if row else None,
        **{f"{s}_matched": _mean(trial, step, s) for s, step in matched.items()},
        **{f"{s}_matched_step": step for s, step in matched.items()},
        "verdict": row.verdict.kind if row and row.verdict else None,
        "parameters": info.get("parameters"),
        **{key: timing.get(key) for key in COSTS},
        "ear_notes": section.note(entry.id),
    }


def _value(setting: Any) -> Any:
    """A list as text: pandas cannot group by lists."""
    return as_text(setting) if isinstance(setting, list | tuple | dict) else setting


def _mean(trial: Trial, step: int | None, score: str) -> float | None:
    """Over the validation items that have a value."""
    if trial.run is None or step is None:
        return None
    values = trial.run.scores.get(step, {}).get(score) or []
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None
