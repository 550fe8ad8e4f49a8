"""The cells of tables that compare variants: the same words and digits on the console, in reports
and on the page."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bgray.compare import Row
    from bgray.results import Entry, Results

BASELINE = "baseline"
NOTHING = "-"
VAGUE = ("name", "weight", "kind")
"""Settings whose last word alone says nothing."""


def seeds(row: "Row") -> str:
    """How many are compared, and how many got nowhere."""
    text = str(len(row.seeds))
    if row.parts is not None and row.parts.other_seeds is not None:
        text += f" + {row.parts.other_seeds} unpaired"
    return text + (f" ({row.unconverged} did not converge)" if row.unconverged else "")


def mean(row: "Row") -> str:
    """`0.4824 ± 0.0031`: over the seeds, with their standard deviation."""
    deviation = "" if row.seed_deviation is None else f" ± {row.seed_deviation:.4f}"
    return NOTHING if row.mean is None else f"{row.mean:.4f}{deviation}"


def difference(row: "Row") -> str:
    """`-0.0113 (-0.0174 to -0.0052)`: to the baseline, with the interval."""
    if row.parts is None or row.verdict is None:
        return NOTHING
    text = f"{row.parts.mean:+.4f}"
    if row.verdict.interval is None:
        return text
    low, high = row.verdict.interval
    return f"{text} ({low:+.4f} to {high:+.4f})"


def verdict(row: "Row") -> str:
    return BASELINE if row.verdict is None else row.verdict.text


def span(numbers: Iterable[int]) -> str:
    """`3`, or `2 to 5`."""
    known = sorted(set(numbers))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def millions(parameters: int | None) -> str:
    """`15.67M`, `407k`."""
    if parameters is None:
        return NOTHING
    return f"{parameters / 1e6:.2f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}k"


def states(counts: Mapping[str, int]) -> str:
    """`finished`, or `2 finished, 1 stopped`."""
    known = {state.replace("_", " "): count for state, count in counts.items() if count}
    if sum(known.values()) == 1:
        return next(iter(known))
    return ", ".join(f"{count} {state}" for state, count in sorted(known.items())) or NOTHING


def setting_names(keys: Iterable[str]) -> dict[str, str]:
    """Short names of settings by their dotted paths: the last word, or as many more as tell it
    from the others and say something. A loss's weight is `loss.l1`, as in a sweep's YAML."""
    full = {}
    for key in keys:
        section, _, rest = key.partition(".")
        full[key] = key.removesuffix(".weight") if section == "loss" and "." in rest else key
    found = {}
    for key, path in full.items():
        others = [f".{other}" for k, other in full.items() if k != key]
        parts = path.split(".")
        for count in range(1 + (path != key), len(parts) + 1):
            found[key] = ".".join(parts[-count:])
            same = any(other.endswith(f".{found[key]}") for other in others)
            if not same and found[key] not in VAGUE:
                break
        else:
            found[key] = key
    return found


def numbers(results: "Results", entry: "Entry") -> dict[str, float | None]:
    """What columns of `of` that are no score's are sorted by; None where nothing is known."""
    row = entry.rows.get(results.metric or "")
    return {
        "seeds": len(row.seeds) if row else None,
        "step": row.step if row else None,
        "vram": entry.vram_gib,
        "parameters": entry.parameters,
        "to_10k": entry.time_to_10k.get("time_to_10k_steps"),
        "wait": entry.data_wait_share,
    }


def elsewhere(results: "Results", entry: "Entry", score: str) -> bool:
    """Whether a score is of another step, or of other seeds, than the one that is judged by: then
    the columns for these are not about it."""
    first, one = entry.rows.get(results.metric or ""), entry.rows.get(score)
    if one is None or one.mean is None:
        return False
    return first is None or (first.step, first.seeds) != (one.step, one.seeds)


def changes(results: "Results", entry: "Entry") -> str:
    """`kernels [41] → [7]`; of a member of a population, whose settings change while it trains,
    `at the start: lr 0.002`."""
    if results.population is None:
        return ", ".join(change.text() for change in entry.changes) or NOTHING
    first = ", ".join(results.first_values(entry))
    return f"at the start: {first}" if first else NOTHING


def of(results: "Results", entry: "Entry") -> dict[str, Any]:
    """What a table shows of a variant, as text by column: variant, changes, seeds, step, one per
    score (its mean and seeds' deviation; where it is of another step or of other seeds, these),
    `<score> difference`, `<score> baseline` (the baseline's mean over the same seeds at the same
    step), vram, parameters, to_10k, wait, states, verdict. Of a member of a population, which is
    compared with nobody, the scores of its last evaluation."""
    row = entry.rows.get(results.metric or "")
    found = {
        "variant": entry.label,
        "changes": changes(results, entry),
        "seeds": NOTHING if row is None else seeds(row),
        "step": NOTHING if row is None or row.step is None else str(row.step),
        "vram": "CPU" if entry.vram_gib is None else f"{entry.vram_gib:.2f} GiB",
        "parameters": millions(entry.parameters),
        "to_10k": entry.time_to_10k_text,
        "wait": NOTHING if (wait := entry.data_wait_share) is None else f"{wait:.0%}",
        "states": states(entry.states),
        "verdict": NOTHING if row is None else verdict(row),
    }
    if entry.vram_gib is None and not entry.time_to_10k:
        found["vram"] = NOTHING  # nothing has been measured yet
    if entry.data_wait_shared:
        found["wait"] += " on a shared GPU"
    for score in results.scores:
        one = entry.rows.get(score)
        found[score] = NOTHING if one is None else mean(one)
        if one is not None and elsewhere(results, entry, score):
            number = len(one.seeds)
            found[score] += f" (step {one.step}, {number} seed{'s' * (number != 1)})"
        found[f"{score} difference"] = NOTHING if one is None else difference(one)
        theirs = None if one is None else one.baseline_mean
        found[f"{score} baseline"] = NOTHING if theirs is None else f"{theirs:.4f}"
    if results.population is not None:
        last = next((m for trial in entry.trials if (m := trial.info.get("metrics"))), {})
        known = {score: last.get(score) for score in results.scores}
        found |= {s: f"{v:.4f}" for s, v in known.items() if v is not None and math.isfinite(v)}
        found |= {"seeds": NOTHING, "step": str(last.get("step", NOTHING))}
    return found
