"""Draws of a sweep's search by Optuna's TPE: the next one from what became of the earlier ones."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bgray.config import ConfigError
from bgray.draws import Entry, entry, rounded
from bgray.problems import Problem
from bgray.sweep_config import Sweep

if TYPE_CHECKING:
    from bgray.search import Trial

TRIES = 50
"""So often a draw is made anew that cannot be built, or is there already, before it is given up."""
INCOMPARABLE = ("task", "validation", "train.steps", "data.path", "data.channels")
"""Paths that change what the score is a score of."""

Values = dict[str, Any]
"""Dotted path to the value drawn."""


@dataclass(frozen=True)
class Outcome:
    """What is known of one draw."""

    values: Values
    state: Literal["complete", "stopped", "running", "worst", "lost"]
    """worst: it diverged, ran out of memory or cannot be built, which is the values' doing. lost:
    it failed in a way that says nothing about them."""
    scores: tuple[float, ...] = ()
    """Means over the seeds, evaluation by evaluation."""


def problems(sweep: Sweep) -> list[Problem]:
    """What `sampler: tpe` does not go with, and the way out."""
    found = []
    if sweep.variants:
        text = "are a list that is known beforehand; with sampler: tpe say what varies in `search`"
        found.append(("variants", f"{text}, or leave the sampler out"))
    if sweep.screening:
        text = "needs all variants at its start, and TPE chooses each one by the scores before it: "
        text += "leave it out, and give the best draws fresh seeds in a second sweep"
        found.append(("screening", text))
    if not sweep.search:
        found.append(("search", "is empty: there is nothing to draw; leave out sampler: tpe"))
    for path in sweep.search:
        if any(f"{path}.".startswith(f"{top}.") for top in INCOMPARABLE):
            text = "changes what the score is a score of, so TPE cannot learn from it; use "
            found.append((f"search.{path}", text + "sampler: random"))
    return found


def suggest(
    space: Mapping[str, Entry],
    told: Sequence[Outcome],
    mode: Literal["min", "max"],
    seed: Sequence[int],
) -> Values:
    """The point to try next. A function of its arguments: a new process draws as the old one would.

    The tree-structured Parzen estimator (Bergstra et al. 2011, algorithm of section 4) as Optuna
    has it, multivariate, through Ray Tune's OptunaSearch. The first ten are random. What was
    stopped at a rung counts by its last score, behind all that got further; what runs still as if
    it were bad, so that others are not drawn beside it.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line for each study
    asked = [_coded(space, outcome.values) for outcome in told if outcome.state == "running"]
    number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    search = OptunaSearch(
        {path: _distribution(optuna.distributions, spec) for path, spec in space.items()},
        metric="score",
        mode=mode,
        points_to_evaluate=asked or None,
        sampler=optuna.samplers.TPESampler(seed=number, multivariate=True, constant_liar=True),
    )
    for outcome in told:
        coded, scores = _coded(space, outcome.values), list(outcome.scores)
        if outcome.state == "complete":
            search.add_evaluated_point(coded, scores[-1], intermediate_values=scores)
        elif outcome.state in ("stopped", "worst"):  # Optuna puts one without scores last
            value: Any = None
            search.add_evaluated_point(coded, value, pruned=True, intermediate_values=scores)
    for i in range(len(asked)):
        search.suggest(f"asked before {i}")
    found = search.suggest("next")
    assert found is not None
    return {path: _decoded(spec, found[path]) for path, spec in space.items()}


def _distribution(kinds: Any, spec: Entry) -> Any:
    if spec.listed:  # by number: Optuna takes no lists for choices
        return kinds.CategoricalDistribution(tuple(range(len(spec.values))))
    low, high = spec.values
    if spec.kind == "randint":
        return kinds.IntDistribution(low, high - 1)
    return kinds.FloatDistribution(float(low), float(high), log=spec.kind == "loguniform")


def _coded(space: Mapping[str, Entry], values: Values) -> Values:
    return {
        path: spec.values.index(values[path]) if spec.listed else values[path]
        for path, spec in space.items()
    }


def _decoded(spec: Entry, value: Any) -> Any:
    if spec.listed:
        return spec.values[value]
    return int(value) if spec.kind == "randint" else spec.fitted(value)


def outcome(values: Values, runs: Collection[Any], *, last: int, running: bool) -> Outcome:
    """Of one draw, from what the agenda knows of its seeds' `runs` (agenda.Known)."""
    steps = sorted(set.intersection(*(set(run.scores) for run in runs)))
    scores = tuple(rounded(sum(run.scores[s] for run in runs) / len(runs)) for s in steps)
    states = {run.state for run in runs}
    if states & {"diverged", "out_of_memory"} or not all(map(math.isfinite, scores)):
        return Outcome(values, "worst")
    if running:
        return Outcome(values, "running")
    if "failed" in states or any(run.final for run in runs):
        return Outcome(values, "lost")
    complete = scores and all(run.step >= last for run in runs)
    return Outcome(values, "complete" if complete else "stopped", scores)


class Draws:
    """What has been drawn for a sweep, and what is still to come.

    make: values to the trial with the first seed; ConfigError where it cannot be built. written:
    what `journal` said to the manifest of an earlier command.
    """

    def __init__(
        self, sweep: Sweep, base: "Trial", make: Callable[[Values], "Trial"], written: dict
    ):
        self.sweep, self._make = sweep, make
        self.space = {path: entry(spec) for path, spec in sweep.search.items()}
        self.values: dict[str, Values] = {}
        """Variant to what was drawn."""
        self.trials: list[Trial] = []
        self._asked = {"search": sweep.search, "base": base.variant}
        self.why: str = written.get("why", "") if written.get("asked") == self._asked else ""
        """Why no more are drawn."""
        self._error = ""
        self._known = {base.variant}
        earlier = [values for values in written.get("drawn", []) if self._fits(values)]
        self._refused = [values for values in written.get("refused", []) if self._fits(values)]
        self._spare = earlier[sweep.samples :]  # for the day there are more samples again
        for values in earlier[: sweep.samples]:
            self._take(values)

    @property
    def left(self) -> int:
        """Draws to come."""
        return 0 if self.why else max(0, self.sweep.samples - len(self.trials))

    def next(self, told: Sequence[Outcome]) -> "Trial | None":
        """Draw one more; None where none can be had, and then `why`.

        told: of those drawn so far.
        """
        mode: Any = self.sweep.mode
        self._error = ""
        for attempt in range(TRIES):
            refused = [Outcome(values, "worst") for values in self._refused]
            seed = (self.sweep.sample_seed, len(self.trials), attempt)
            values = suggest(self.space, [*told, *refused], mode, seed)
            if trial := self._take(values):
                return trial
        text = self._error or "all of them are there already"
        self.why = f"{TRIES} draws in a row were of no use ({text}): {len(self.trials)} of "
        self.why += f"{self.sweep.samples} samples were drawn"
        return None

    def journal(self) -> dict[str, Any]:
        """For the manifest: written before a draw starts, it is the same draw after any crash."""
        drawn = [self.values[trial.variant] for trial in self.trials]
        found = {"drawn": [*drawn, *self._spare], "refused": list(self._refused)}
        return {**found, "asked": self._asked, "why": self.why}

    def _take(self, values: Values) -> "Trial | None":
        try:
            trial = self._make(values)
        except ConfigError as error:
            self._error = " ".join(str(error).split())
            if values not in self._refused:
                self._refused.append(values)
            return None
        if trial.variant in self._known:
            return None
        self._known.add(trial.variant)
        self.values[trial.variant] = values
        self.trials.append(trial)
        return trial

    def _fits(self, values: Values) -> bool:
        """Whether the search, which may have been changed since, could draw it."""
        return values.keys() == self.space.keys() and all(
            spec.has(values[path]) for path, spec in self.space.items()
        )


def honesty(num_draws: int) -> str:
    """What to bear in mind of the best of so many."""
    return (
        f"The best of {num_draws} draws looks better than it is: it was chosen by the very scores "
        "it is shown with. Fresh seeds tell: give its values and the base's as `variants`, with "
        "another train.seed and seeds: 3."
    )
