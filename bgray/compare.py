"""Compare: variants with their baseline over seeds and validation items, each with a verdict.

python -m bgray.compare RUN_OR_VARIANT ... [--metric M] [--at STEP] [--baseline X] [--json]

A run folder, a sweep's folder (all its variants), or <sweep's folder>/<variant's id or label>.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bgray import cells, verdicts
from bgray.config import ConfigError
from bgray.problems import unknown
from bgray.train import errors_in_one_line
from bgray.variants import Run, Variant, direction, find, sweep_variants
from bgray.verdicts import Mode, Parts, Pool, Verdict

Runs = dict[int, Run]
"""By seed."""
STYLES = {"better": "green", "worse": "red", "unstable": "red"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "named",
        nargs="+",
        metavar="RUN_OR_VARIANT",
        help="a run's folder, a sweep's, or <sweep's folder>/<variant's id or label>",
    )
    parser.add_argument("--metric", help="default: what the sweep compares by")
    parser.add_argument("--at", type=int, metavar="STEP", help="default: the last both reached")
    parser.add_argument("--level", type=float, default=0.95, help="of all intervals together")
    parser.add_argument(
        "--looks",
        type=int,
        help="the how-manieth look it is, each with more seeds; default: the sweep's count",
    )
    parser.add_argument("--baseline", help="a variant's label, or a folder; default: the sweep's")
    parser.add_argument("--json", action="store_true", help="one object, unrounded")
    args = parser.parse_args(argv)
    with errors_in_one_line(resumes=False):
        problems = []
        if not 0 < args.level < 1:
            problems.append(("--level", f"must be between 0 and 1, got {args.level:g}"))
        if args.looks is not None and args.looks < 1:
            problems.append(("--looks", f"must be at least 1, got {args.looks}"))
        if problems:
            raise ConfigError("python -m bgray.compare", problems)
        found, name, default = find(args.named)
        if args.baseline is not None:
            found, default = _with_baseline(found, args.baseline)
        comparison = compare(
            found,
            name=name,
            baseline=default,
            metric=args.metric,
            at=args.at,
            level=args.level,
            looks=args.looks,
        )
        if args.json:
            print(json.dumps(comparison.to_json(), indent=1))
            return
        Console(width=None if sys.stdout.isatty() else 160).print(comparison.table())


def _with_baseline(found: list[Variant], wanted: str) -> tuple[list[Variant], str]:
    """(variants, the baseline's id) for what --baseline says: one of them, or a folder."""
    for variant in found:
        if wanted in (variant.id, variant.label, *(run.id for run in variant.runs.values())):
            return found, variant.id
    try:
        more, _, default = find([wanted])
    except ConfigError:
        text = unknown(wanted, [v.label for v in found], "variant")
        raise ConfigError("--baseline", [("", text)]) from None
    chosen = next((v for v in more if v.id == default), more[0])
    return [chosen, *(v for v in found if v.id != chosen.id)], chosen.id


# --- what a comparison is


@dataclass(frozen=True)
class Row:
    """One variant against the baseline; the baseline's own row has neither parts nor verdict."""

    id: str
    label: str
    control: bool
    seeds: tuple[int, ...]
    """Whose scores are compared: of paired rows the baseline's too."""
    lost: tuple[int, int]
    """(k, n): k of n seeds diverged."""
    unconverged: int
    """Of those seeds, with the ones that ended no better than they began: their scores count."""
    step: int | None
    mean: float | None
    """The variant's, over `seeds` and all items of which each of them has a value, at `step`; also
    those of which the baseline has none, so it may differ from `baseline_mean` by more than the
    difference that is judged."""
    seed_deviation: float | None
    """Standard deviation over seeds of the mean over items; None for one seed."""
    baseline_mean: float | None = None
    """The baseline's, over the seeds it is compared with and the items of which both have a value,
    at `step`; None in its own row."""
    parts: Parts | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Comparison:
    """A sweep's variants, or some of them, against one baseline; the first row is the baseline."""

    name: str
    metric: str
    mode: Mode
    baseline: str
    level: float
    looks: int
    rows: tuple[Row, ...]
    unprocessed: float | None
    """What the unprocessed input scores."""
    removed: float | None
    """Share of the variance of differences that common random numbers removed."""

    def table(self) -> Table:
        way = "lower" if self.mode == "min" else "higher"
        title = f"{self.name}: {self.metric} ({way} is better) against {self.baseline}"
        table = Table(
            title=escape(title),
            title_justify="left",
            caption=escape(self.method()),
            caption_justify="left",
        )
        table.add_column("variant", overflow="fold", max_width=44)
        for column in ("seeds", "at step", "mean ± sd of seeds", "difference", "items"):
            table.add_column(column, justify="right")
        table.add_column("verdict", overflow="fold")
        for row in self.rows:
            table.add_row(
                escape(row.label) + (" [dim](control)[/]" if row.control else ""),
                cells.seeds(row),
                "-" if row.step is None else str(row.step),
                cells.mean(row),
                cells.difference(row),
                "-" if row.parts is None else str(row.parts.items),
                _styled(row),
            )
        if self.unprocessed is not None:
            table.add_row("unprocessed input", "-", "-", f"{self.unprocessed:.4f}", "-", "-", "-")
        return table

    def method(self) -> str:
        """In one line, how the intervals come about."""
        judged = [row for row in self.rows if row.parts and row.verdict and row.verdict.interval]
        number = len(self.rows) - 1
        if not judged:
            return "no intervals: they take two seeds of a variant and of the baseline"
        sizes = [row.parts for row in judged if row.parts is not None]
        paired = [p for p in sizes if p.other_seeds is None]
        seeds = cells.span(p.seeds for p in paired) if paired else ""
        pairs = f"paired over {seeds} seed{'s' * (seeds != '1')} x " if paired else "unpaired "
        text = (
            f"simultaneous {100 * self.level:g}% intervals (Bonferroni over {number} "
            f"comparison{'s' * (number != 1)}{f', look {self.looks}' * (self.looks > 1)}), "
            f"{pairs}{cells.span(p.items for p in sizes)} items, at the last step both reached"
        )
        if self.removed is None:
            return text
        does = "removed" if self.removed >= 0 else "added"
        return f"{text}; common random numbers {does} {abs(self.removed):.0%} of the variance"

    def to_json(self) -> dict[str, Any]:
        """Plain data, nothing rounded."""
        raw = dataclasses.asdict(self)
        for row in raw["rows"]:
            if row["parts"] and (variance := row["parts"]["bootstrap_variance"]) is not None:
                row["bootstrap_standard_error"] = variance**0.5
        return {**raw, "comparisons": len(self.rows) - 1, "method": self.method()}


def _styled(row: Row) -> str:
    """For rich."""
    if row.verdict is None:
        return f"[dim]{cells.BASELINE}[/]"
    style, text = STYLES.get(row.verdict.kind), escape(row.verdict.text)
    return f"[{style}]{text}[/]" if style else text


# --- from runs to rows


def compare_sweep(folder: str, metric: str | None = None, **options: Any) -> Comparison:
    """All variants of a sweep's folder against its baseline; also while it is running. Options as
    of `compare`. ConfigError where nothing can be compared."""
    found, name, baseline = sweep_variants(folder)
    return compare(found, name=name, baseline=baseline, metric=metric, **options)


def compare(
    found: Sequence[Variant],
    *,
    name: str,
    baseline: str | None = None,
    metric: str | None = None,
    at: int | None = None,
    level: float = 0.95,
    looks: int | None = None,
) -> Comparison:
    """The first variant, or that with the id `baseline`, against each of the others: at `at`, or
    at the last step that all seeds of both have reached that are used.

    Ranked by the difference, those that came furthest first (`_rank`).
    looks: the how-manieth look it is, each with more seeds; None: as the sweep has counted.
    """
    looks = looks or max(variant.looks for variant in found)
    _refuse_members(found, name)
    runs = [run for variant in found for run in variant.runs.values() if run.scores]
    if not runs:
        text = "no run has been evaluated yet; wait for the first evaluation"
        raise ConfigError(name, [("", text)])
    _refuse_other_validation(runs, name)
    metric, mode = direction(found, runs, metric, name)
    base = next((v for v in found if v.id == baseline), found[0])
    others = [v for v in found if v is not base]
    pairs = [_pair(variant, base, metric, at) for variant in others]
    diverged = any(p.lost[0] for p in pairs) or any(_kept(base, v)[1][0] for v in others)
    if others and all(pair.step is None for pair in pairs) and not diverged:
        raise ConfigError(name, [("", _no_step(found, metric, at))])
    pools: dict[int | None, Pool | None] = {}
    for step in {pair.step for pair in pairs} - {None}:
        at_it = [_pair(variant, base, metric, step) for variant in others]
        pools[step] = verdicts.pooled([p.parts for p in at_it if p.parts is not None])
    rows = [
        dataclasses.replace(
            pair,
            verdict=verdicts.judge(
                pair.parts,
                mode=mode,
                pool=pools.get(pair.step),
                comparisons=len(others),
                look=looks,
                level=level,
                lost=pair.lost,
                baseline_lost=_kept(base, variant)[1],
            ),
        )
        for variant, pair in zip(others, pairs, strict=True)
    ]
    rows.sort(key=lambda row: _rank(row, mode))
    own = dataclasses.replace(_pair(base, base, metric, at), parts=None, baseline_mean=None)
    values = [v for r in runs if (v := r.info.get("baseline", {}).get(metric)) is not None]
    return Comparison(
        name=name,
        metric=metric,
        mode=mode,
        baseline=base.label,
        level=level,
        looks=looks,
        rows=(own, *rows),
        unprocessed=values[0] if values else None,
        removed=verdicts.removed_by_pairing([row.parts for row in rows if row.parts is not None]),
    )


def _refuse_members(found: Sequence[Variant], name: str) -> None:
    """Of one population: what one of them has learnt the others have as well."""
    populations = [v.population for v in found if v.population is not None]
    if len({*populations}) < len(populations):
        text = "members of a population copy from each other; they are no variants to compare "
        text += "(the report has the schedule that they found)"
        raise ConfigError(name, [("", text)])


def _refuse_other_validation(runs: Iterable[Run], name: str) -> None:
    sets: dict[str, list[str]] = {}
    for run in runs:
        sets.setdefault(str(run.info.get("validation")), []).append(run.id)
    if len(sets) > 1:
        those = ", ".join(f"{key} ({ids[0]}, {len(ids)} in all)" for key, ids in sets.items())
        text = f"runs were validated on different sets: {those}; compare runs of one set only"
        raise ConfigError(name, [("", text)])


def _no_step(found: Sequence[Variant], metric: str, at: int | None) -> str:
    steps = {s for v in found for run in v.runs.values() for s in run.steps(metric)}
    have = ", ".join(map(str, sorted(steps)))
    if at is not None:
        return f"no two variants were evaluated at step {at}; runs were at {have}"
    return f"no step at which both a variant and the baseline were evaluated; runs were at {have}"


def _kept(variant: Variant, other: Variant) -> tuple[dict[int, Run], tuple[int, int]]:
    """(runs by seed that may be compared, (k, n) that diverged).

    Who was chosen by a screening is judged on fresh seeds, or the luck it was chosen for would
    count again; so is then the baseline against it.
    """
    runs = dict(variant.runs)
    if variant.screening_seed is not None and len(other.runs) > 1 and len(runs) > 1:
        runs.pop(variant.screening_seed, None)
    begun = {seed: run for seed, run in runs.items() if run.scores or run.lost}
    kept = {seed: run for seed, run in begun.items() if not run.lost}
    return kept, (len(begun) - len(kept), len(begun))


def _pair(variant: Variant, base: Variant, metric: str, at: int | None) -> Row:
    mine, lost = _kept(variant, base)
    theirs, _ = _kept(base, variant)
    mine, theirs = (_those(side, lambda run: bool(run.steps(metric))) for side in (mine, theirs))
    worse = sum(run.lost or run.info.get("converged") is False for run in variant.runs.values())
    row = Row(variant.id, variant.label, variant.control, (), lost, worse, None, None, None)
    paired = bool(mine.keys() & theirs.keys())
    # A seed that has just begun would pull the comparison back to its first evaluation: seeds that
    # are still on their way wait, if two others are done. How a run does has no part in this.
    done = (_those(mine, lambda run: run.ended), _those(theirs, lambda run: run.ended))
    if at is not None:
        mine, theirs = (
            _those(side, lambda run: at in run.steps(metric)) for side in (mine, theirs)
        )
    elif min(map(len, _shared(*done) if paired else done)) >= 2:
        mine, theirs = done
    if paired:
        mine, theirs = _shared(mine, theirs)
    steps = [run.steps(metric) for run in (*mine.values(), *theirs.values())]
    common = set.intersection(*steps) if mine and theirs else set()
    if not common:
        return row
    step = max(common) if at is None else at
    scores = _scores(mine, step, metric)
    others = _scores(theirs, step, metric)
    found = verdicts.parts(scores, others, paired=paired)
    if found is None:
        return row
    known = np.isfinite(scores).all(0)  # (M,)
    means = scores[:, known].mean(1)  # (N,)
    return dataclasses.replace(
        row,
        seeds=tuple(sorted(mine)),
        step=step,
        mean=float(means.mean()),
        seed_deviation=float(means.std(ddof=1)) if len(means) > 1 else None,
        baseline_mean=float(others[:, known & np.isfinite(others).all(0)].mean()),
        parts=found,
    )


def _those(runs: Runs, good: Callable[[Run], bool]) -> Runs:
    return {seed: run for seed, run in runs.items() if good(run)}


def _shared(mine: Runs, theirs: Runs) -> tuple[Runs, Runs]:
    """The seeds that both have."""
    both = sorted(mine.keys() & theirs.keys())
    return {seed: mine[seed] for seed in both}, {seed: theirs[seed] for seed in both}


def _scores(runs: dict[int, Run], step: int, metric: str) -> np.ndarray:
    """(N, M), seeds in order."""
    return np.array([runs[seed].scores[step][metric] for seed in sorted(runs)], dtype=float)


def _rank(row: Row, mode: Mode) -> tuple[int, int, float]:
    """Below every variant with two seeds or more stand those whose other seeds are lost, then
    those of one seed: both may owe their place to luck."""
    if row.parts is None or row.step is None:
        return (3, 0, 0.0)
    group = 2 if row.parts.variances is None else int(row.lost[0] > 0)
    return (group, -row.step, row.parts.mean if mode == "min" else -row.parts.mean)


if __name__ == "__main__":
    from bgray.compare import main

    main()
