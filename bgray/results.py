"""A sweep as report and dashboard show it: its variants with what they cost and how they compare,
its trials, their curves."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bgray.cells import setting_names
from bgray.compare import Comparison, Row, compare
from bgray.console import time_to_10k
from bgray.curves import NONE, Curve, Curves
from bgray.problems import ConfigError
from bgray.records import METRICS, TIMING
from bgray.variants import Run, Variant, flattened
from bgray.verdicts import Mode


@dataclass(frozen=True)
class Trial:
    """One run of a variant, begun or not."""

    id: str
    variant: str
    """Its id."""
    seed: int
    label: str
    """The variant's."""
    url: str
    state: str
    """As in run.json; `waiting` where it has not begun, `interrupted` where run.json says that it
    is running and its process is dead; `damaged` where its files cannot be read."""
    reason: str
    """Why it is in this state; may be empty."""
    run: Run | None
    clips: tuple[str, ...] = ()
    """Names of the files in its clips/, sorted."""
    changed: float | None = None
    """When one of its files last changed, in Unix time."""

    @property
    def info(self) -> dict[str, Any]:
        """run.json; empty where there is none."""
        return self.run.info if self.run else {}

    @property
    def step(self) -> int:
        return self.info.get("step") or 0


@dataclass(frozen=True)
class Change:
    """One setting of a variant that is not the baseline's; None where one of them has no such."""

    key: str
    """The dotted path, such as model.kernels."""
    before: Any
    """The baseline's."""
    after: Any
    name: str = dataclasses.field(default="", compare=False)
    """As short as tells it from the other settings that vary."""

    def text(self) -> str:
        """`kernels [41] → [7, 23, 41]`."""
        name = self.name or self.key.rsplit(".", 1)[-1]
        return f"{name} {as_text(self.before)} → {as_text(self.after)}"


def as_text(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_text, value)) + "]"
    return str(value)


@dataclass(frozen=True)
class Entry:
    """A variant: its trials, what they cost, and how they compare with the baseline's."""

    id: str
    label: str
    number: int
    """Its place in the sweep, from 0: colour and key stay as they are while ranks change."""
    control: bool
    trials: tuple[Trial, ...]
    """By seed."""
    changes: tuple[Change, ...]
    rows: dict[str, Row]
    """By score: how it compares with the baseline; the scores for which that can be said."""

    @property
    def states(self) -> Counter[str]:
        return Counter(trial.state for trial in self.trials)

    @property
    def parameters(self) -> int | None:
        return next((p for t in self.trials if (p := t.info.get("parameters")) is not None), None)

    @property
    def vram_gib(self) -> float | None:
        """The most that a seed of it has held; None where none ran on a GPU."""
        found = [v for timing in self._timings() if (v := timing.get("vram_peak_gib")) is not None]
        return max(found, default=None)

    @property
    def data_wait_share(self) -> float | None:
        """Mean over the seeds that had their GPU alone, if there are any."""
        found = [timing["data_wait_share"] for timing in self._alone("data_wait_share")]
        return statistics.fmean(found) if found else None

    @property
    def data_wait_shared(self) -> bool:
        """Whether all that is known of it is of a GPU that was shared: no figure to compare."""
        return any(timing.get("packed") for timing in self._alone("data_wait_share"))

    @property
    def time_to_10k(self) -> dict[str, Any]:
        """The timing of the seed that was neither fastest nor slowest (of two: the slower one), of
        those that had their GPU alone if there are any; as in run.json, empty where none is
        known."""
        alone = self._alone("time_to_10k_steps")
        exact = [t for t in alone if not t.get("time_to_10k_steps_extrapolated")]
        found = sorted(exact or alone, key=lambda t: t["time_to_10k_steps"])
        return found[len(found) // 2] if found else {}

    @property
    def time_to_10k_text(self) -> str:
        """`29 min`; `~29 min` extrapolated; `(29 min)` of a GPU that was shared."""
        return time_to_10k(self.time_to_10k)

    def _alone(self, key: str) -> list[dict[str, Any]]:
        """Timings that have `key`: of those that had their GPU alone, or else of all."""
        known = [t for t in self._timings() if t.get(key) is not None]
        return [t for t in known if not t.get("packed")] or known

    def _timings(self) -> list[dict[str, Any]]:
        return [t for trial in self.trials if (t := trial.info.get("timing"))]


@dataclass(frozen=True)
class Driver:
    """The command that works, or worked, on a sweep."""

    state: str
    """`running`, `dead` (it left its lease behind), or `none`."""
    who: dict[str, Any]
    """Its lease: what, host, pid, command, started."""


COMPARED = ("state", "scores", "baseline", "validation", "converged")
"""What of run.json a comparison looks at, beside the scores by item."""


class Memory:
    """The last comparison: a log that has grown does not change it."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] | None = None

    def of(self, facts: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when the facts were the same; else what it makes now."""
        kept = self._kept  # one look: other threads write it
        if kept is None or kept[0] != facts:
            self._kept = kept = facts, make()
        return kept[1]


class Results:
    """One sweep's folder as it was at one moment."""

    def __init__(
        self,
        url: str,
        name: str,
        found: Sequence[Variant],
        baseline: str | None,
        trials: Sequence[Trial],
        driver: Driver,
        listing: dict[str, Any],
        curves: Curves,
        problems: Sequence[str],
        memory: "Memory | None" = None,
    ):
        self.url, self.name, self.driver = url, name, driver
        self.variants, self._baseline = list(found), baseline
        self.trials = {trial.id: trial for trial in trials}
        """By run id."""
        self.rungs: list[int] = listing.get("rungs") or []
        self.problems = list(problems)
        """Files that could not be read, in words."""
        self._listing, self._curves = listing, curves
        self._memory = memory or Memory()

    @cached_property
    def scores(self) -> dict[str, Mode]:
        """The task's scores and which way is better, the one that is compared first."""
        modes = next((s for t in self.trials.values() if (s := t.info.get("scores"))), {})
        first = self._listing.get("metric")
        if first:
            modes = {first: self._listing["mode"], **modes}
        if modes or not self.trials:
            return modes
        try:
            chosen = compare(self.variants, name=self.url, baseline=self._baseline)
        except ConfigError:
            return {}
        return {chosen.metric: chosen.mode}

    @property
    def metric(self) -> str | None:
        """What the variants are ranked and judged by; None where nothing is known yet."""
        return next(iter(self.scores), None)

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """By score, as `bgray.compare --metric` has them; none while nothing can be compared."""
        facts = [self.name, self._baseline, list(self.scores), self._judged()]
        found, self.why_not = self._memory.of(facts, self._compared)
        return found

    def _compared(self) -> tuple[dict[str, Comparison], str]:
        found, why_not = {}, ""
        for metric in self.scores:
            try:
                found[metric] = compare(
                    self.variants, name=self.name, baseline=self._baseline, metric=metric
                )
            except ConfigError as error:
                why_not = "; ".join(text for _, text in error.problems)
        return found, why_not

    def _judged(self) -> list[Any]:
        """All that a comparison looks at."""
        return [
            (
                dataclasses.replace(variant, runs={}),
                [
                    (seed, run.id, run.scores, [run.info.get(key) for key in COMPARED])
                    for seed, run in variant.runs.items()
                ],
            )
            for variant in self.variants
        ]

    why_not = ""
    """Why there is no comparison."""

    @property
    def population(self) -> dict[str, Any] | None:
        """sweep.json's journal of a population (pbt), whose members copy from each other and are
        not compared; None for a sweep of variants."""
        found = self._listing.get("pbt")
        return found if isinstance(found, dict) else None

    @property
    def baseline(self) -> Entry | None:
        if self.population is not None:
            return None
        return next((entry for entry in self.entries if entry.id == self._base_id), None)

    @property
    def _base_id(self) -> str | None:
        known = [variant.id for variant in self.variants]
        return self._baseline if self._baseline in known else next(iter(known), None)

    @cached_property
    def entries(self) -> list[Entry]:
        """The variants: the baseline, then by rank, those that cannot be compared last."""
        by_metric = {m: {row.id: row for row in c.rows} for m, c in self.comparisons.items()}
        first = by_metric.get(self.metric or "", {})
        rank = {id: place for place, id in enumerate(first)}
        trials: dict[str, list[Trial]] = {}
        for trial in sorted(self.trials.values(), key=lambda trial: trial.seed):
            trials.setdefault(trial.variant, []).append(trial)
        base = next((v for v in self.variants if v.id == self._base_id), None)
        changes = {v.id: self.differences(base, v) if base else [] for v in self.variants}
        keys = dict.fromkeys(change.key for found in changes.values() for change in found)
        names = setting_names(keys)
        found = [
            Entry(
                variant.id,
                variant.label,
                number,
                variant.control,
                tuple(trials.get(variant.id, [])),
                tuple(dataclasses.replace(c, name=names[c.key]) for c in changes[variant.id]),
                {metric: rows[variant.id] for metric, rows in by_metric.items()},
            )
            for number, variant in enumerate(self.variants)
        ]
        return sorted(found, key=lambda e: (e.id != self._base_id, rank.get(e.id, len(rank))))

    def differences(self, base: Variant, variant: Variant) -> list[Change]:
        """Of their configs, but what says nothing of the experiment (seed, name, runtime)."""
        return _changes(self.settings(base), self.settings(variant))

    def settings(self, variant: Variant | Entry) -> dict[str, Any]:
        """The variant's config as dotted paths; empty before its first run has begun."""
        return self._settings[variant.id]

    @cached_property
    def _settings(self) -> dict[str, dict[str, Any]]:
        found = {}
        for variant in self.variants:
            runs = variant.runs.values()
            flat = next((flattened(run.experiment) for run in runs), {})
            found[variant.id] = {
                key: value
                for key, value in flat.items()
                if key not in ("train.seed", "name") and not key.startswith("runtime.")
            }
        return found

    @property
    def varying(self) -> list[str]:
        """Dotted paths of the settings that are not the same in all variants, in the config's
        order."""
        return list(dict.fromkeys(change.key for e in self.entries for change in e.changes))

    def first_values(self, entry: Entry) -> list[str]:
        """`lr 0.002`, for each setting that varies: what a variant begins with."""
        settings, names = self.settings(entry), setting_names(self.varying)
        return [f"{name} {as_text(settings[k])}" for k, name in names.items() if k in settings]

    @property
    def unprocessed(self) -> dict[str, float]:
        """What the unprocessed input scores."""
        return next((b for t in self.trials.values() if (b := t.info.get("baseline"))), {})

    @property
    def states(self) -> Counter[str]:
        return Counter(trial.state for trial in self.trials.values())

    # --- curves

    def curve_names(self) -> list[str]:
        """Scores first, then what is logged while training."""
        return list(dict.fromkeys([*self.scores, *self._curves.names(self.trials)]))

    def fetch(self, minutes: bool = False) -> None:
        """Have all trials' curves read at once, which from S3 is faster than one after another.

        minutes: also what `minutes` needs.
        """
        for name in (METRICS, TIMING)[: 1 + minutes]:
            self._curves.fetch(self.trials, name)

    def curve(self, trial: Trial, name: str) -> Curve:
        """By step; empty where nothing of that name is logged."""
        if name in self.scores:
            return self._curves.scores(trial.id).get(name, NONE)
        return self._curves.of(trial.id, METRICS).get(name, NONE)

    def minutes(self, trial: Trial, steps: np.ndarray) -> np.ndarray:
        """Training time at each of the steps, warm-up, validation and checkpoints included; NaN
        after the last that is logged."""
        lines = self._curves.of(trial.id, TIMING)
        parts = [
            lines[n] for n in ("train_seconds", "warm_up_seconds", "other_seconds") if n in lines
        ]
        if not parts:
            return np.full(len(steps), np.nan)
        at = parts[0][0]
        seconds = sum(np.interp(at, *part) for part in parts)
        return np.interp(steps, np.r_[0, at], np.r_[0, seconds] / 60, right=np.nan)

    def progress(self, trial: Trial) -> int:
        """The last step that is logged, of a running trial; the last that is recorded, of another
        one."""
        if trial.state != "running":
            return trial.step
        return max(trial.step, self._curves.last_step(trial.id, TIMING))


def _changes(one: dict[str, Any], other: dict[str, Any]) -> list[Change]:
    if not one or not other:
        return []
    return [
        Change(key, one.get(key), other.get(key))
        for key in dict.fromkeys([*other, *one])
        if one.get(key) != other.get(key)
    ]
