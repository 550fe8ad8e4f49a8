"""What a sweep does next: which trial to start, how far it may go, when it is over.

Decided from the records of its trials, so that a new start decides as the old one would have.
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any, Literal, cast

from bgray import rungs, screening, storage, tpe
from bgray.known import Known, read, score_of
from bgray.pbt import Population, scores_of
from bgray.search import Trial, drawn, member
from bgray.search import rungs as rungs_of
from bgray.sweep_config import Sweep
from bgray.variants import MANIFEST, read_manifest

GONE = ("diverged", "failed", "out_of_memory")
"""Ends without a score to wait for."""
BUDGET = "the budget is spent; a larger one goes on from here"


class Agenda:
    """Asked what to start (`start`), told what came (`report`, `close`); knows no Ray.

    weigh: GPUs that a trial holds (1 where there are none), for the budget.
    """

    def __init__(
        self,
        sweep: Sweep,
        trials: list[Trial],
        *,
        weigh: Callable[[Trial], float] = lambda trial: 1.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self.sweep, self.weigh, self._now = sweep, weigh, now
        self.folder = trials[0].url.rsplit("/", 1)[0]
        self._written = read_manifest(self.folder) or {}
        base, first = trials[0], trials[0].seed
        self.draws: tpe.Draws | None = None
        if sweep.sampler == "tpe":
            self.draws = tpe.Draws(sweep, base, lambda v: drawn(sweep, base, v), self._written)
            trials = [*trials, *(t for draw in self.draws.trials for t in self._seeds_of(draw))]
        self.trials = {trial.id: trial for trial in trials}
        self.known = {trial.id: read(trial, sweep) for trial in trials}
        # Members of a population have a seed of their own each.
        self.variants = {t.variant: t for t in trials if t.seed == first or sweep.pbt}
        named = [v for v, t in self.variants.items() if t.label == sweep.baseline]
        self.baseline = (named or list(self.variants))[0]
        self.rungs = rungs_of(sweep, trials)
        self.controls = self._choose_controls()
        self.screening_seed = first if sweep.screening else None
        self._judged = tuple(self.trials)
        """Trials that rungs are for; those of a shortlist run to their end."""
        self.confirmation: dict[str, Any] | None = None
        same = self._written.get("rungs") == list(self.rungs)
        self._granted: dict[str, int] = dict(self._written.get("granted", {})) if same else {}
        self.looks: list[int] = list(self._written.get("looks", []))
        """Numbers of seeds at which verdicts were given."""
        self.population: Population | None = None
        if sweep.pbt:
            self.population = Population(
                sweep,
                {trial.id: trial.url for trial in trials},
                base.experiment,
                lambda values: member(sweep, base.experiment, values, 0),
                self._written.get("pbt"),
                self.write_manifest,
            )
        self.to_choose = sweep.screening is not None
        """Whether a shortlist is due once the first round is over."""
        if sweep.screening and (found := self._written.get("confirmation")):
            new = bool(self.waiting())  # variants that were not there: they are screened first
            self._confirm(found)  # its runs count, whatever is chosen now
            self.to_choose = new or not screening.holds(found, sweep.screening, sweep.budget)

    # --- what to do

    def start(self) -> Trial | None:
        """The trial to start now, which then counts as running; None where there is none now."""
        if self.spent():
            return None
        if not (waiting := self.waiting()) and self._more():
            self._decide()
            waiting = self.waiting()
        if not waiting or self.spent():
            return None
        # The lowest rung first: what goes on from there is then chosen among more.
        chosen = min(waiting, key=self._place)
        self.known[chosen.id].started = self._now()
        self._grant(chosen)
        return chosen

    def running(self) -> list[Trial]:
        return [t for t in self.trials.values() if self.known[t.id].started is not None]

    def over(self) -> bool:
        """Nothing runs and nothing will."""
        if self.running():
            return False
        return self.spent() or not (self.waiting() or self._more())

    def _more(self) -> bool:
        """Whether there is something to decide, where nothing waits."""
        return bool(self.draws and self.draws.left) or self._gathered() or self._screened()

    def _decide(self) -> None:
        if self.draws and self.draws.left:
            self._draw(self.draws)
        elif self.population:
            self.population.turn(scores_of(self._left(), self.population.allowed()))
        else:
            self._choose_shortlist()

    def report(self, run_id: str, step: int, metrics: dict[str, Any]) -> bool:
        """An evaluation, with its checkpoint written; whether the trial may go on."""
        known = self.known[run_id]
        known.scores[step] = score_of(metrics, self.sweep)
        known.step = max(known.step, step)
        goes_on = known.step < self._grant(self.trials[run_id])
        known.unpaid = goes_on and self.spent()
        return goes_on and not known.unpaid

    def close(self, run_id: str, *, failed: bool = False) -> None:
        """The trial's process has ended, or is about to: what its record says of it counts.

        failed: it died, and is not started again.
        """
        known, trial = self.known[run_id], self.trials[run_id]
        hours = known.hours + self._held(known)
        fresh = read(trial, self.sweep)
        fresh.unpaid = known.unpaid
        fresh.scores = {**known.scores, **fresh.scores}
        fresh.step = max(known.step, fresh.step)
        if fresh.state == "running":  # it could not say so, or has not yet
            fresh.state = "failed" if failed else "stopped"
        again = fresh.state == "out_of_memory" and fresh.packed and not known.alone
        self.known[run_id] = dataclasses.replace(
            fresh, hours=hours, alone=known.alone or again, final=fresh.state in GONE and not again
        )

    def lose(self, run_id: str) -> None:
        """It cannot be started: not to be tried again in this session."""
        self.known[run_id] = dataclasses.replace(self.known[run_id], final=True, started=None)

    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.sweep.budget is not None and self.hours() >= self.sweep.budget.gpu_hours

    def hours(self) -> float:
        """GPU-hours (trial-hours without GPUs) of all trials so far."""
        held = {i: k.hours + self._held(k) for i, k in self.known.items()}
        return sum(self.weigh(self.trials[i]) * hours for i, hours in held.items())

    def _held(self, known: Known) -> float:
        """Hours of the present start."""
        return 0.0 if known.started is None else (self._now() - known.started) / 3600

    # --- rungs

    def field(self) -> rungs.Field:
        """The race as it stands."""
        judged = [self.trials[run_id] for run_id in self._judged]
        seeds: dict[str, list[int]] = {}
        for trial in judged:
            seeds.setdefault(trial.variant, []).append(trial.seed)
        lost = [t for t in judged if self.known[t.id].final or self.known[t.id].state == "diverged"]
        # Draws to come count as there and not yet judged: a rung is whole once they are, too.
        to_come = [f"draw {i}" for i in range(self.draws.left)] if self.draws else []
        seeds |= dict.fromkeys(to_come, seeds[self.baseline])
        return rungs.Field(
            variants=(*self.variants, *to_come),
            seeds={variant: tuple(found) for variant, found in seeds.items()},
            baseline=self.baseline,
            controls=self.controls,
            rungs=self.rungs,
            last=judged[0].experiment.train.steps,
            mode=cast(Literal["min", "max"], self.sweep.mode),
            scores={(t.variant, t.seed): dict(self.known[t.id].scores) for t in judged},
            lost=frozenset((t.variant, t.seed) for t in lost),
            granted=dict(self._granted),
        )

    def _grant(self, trial: Trial) -> int:
        """The step up to which it may run, which it keeps."""
        steps = trial.experiment.train.steps
        if self.population:
            return min(steps, self.population.allowed())
        if self.sweep.asha is None or trial.id not in self._judged:
            return steps
        self._granted[trial.variant] = self._limits()[trial.variant]
        return min(steps, self._granted[trial.variant])

    def _limits(self) -> dict[str, int]:
        assert self.sweep.asha is not None
        return rungs.allowed(self.field(), self.sweep.asha.reduction_factor)

    def _choose_controls(self) -> frozenset[str]:
        share = self.sweep.asha.controls if self.sweep.asha else 0.0
        name = next(iter(self.trials.values())).experiment.name
        return rungs.choose_controls(tuple(self.variants), self.baseline, share, name)

    def waiting(self) -> list[Trial]:
        """Those that would be started, were it not for the budget."""
        limits = self._limits() if self.sweep.asha else {}
        found = []
        for trial in self.trials.values():
            known, until = self.known[trial.id], trial.experiment.train.steps
            if self.population:
                until = min(until, self.population.allowed())
            elif trial.id in self._judged:
                until = min(until, limits.get(trial.variant, until))
            ended = known.final or known.state == "diverged" or known.started is not None
            if not ended and known.step < until:
                found.append(trial)
        return found

    def _place(self, trial: Trial) -> tuple[int, int, int, bool]:
        """By rung; what has begun before what has not; seed by seed, the baseline first, so that
        what a night's end leaves can be compared. Of equals, `min` takes the first in order."""
        step = self.known[trial.id].step
        rung = sum(rung <= step for rung in self.rungs)
        return rung, -step, trial.seed, trial.variant != self.baseline

    # --- draws, population

    def _seeds_of(self, draw: Trial) -> list[Trial]:
        return [draw.with_seed(draw.seed + i) for i in range(self.sweep.seeds)]

    def _draw(self, draws: tpe.Draws) -> None:
        """One variant more, written down before it starts."""
        busy = {trial.variant for trial in self.running()}
        runs: dict[str, list[Known]] = {variant: [] for variant in draws.values}
        for trial in self.trials.values():
            if trial.variant in runs:
                runs[trial.variant].append(self.known[trial.id])
        last = next(iter(self.trials.values())).experiment.train.steps
        if draw := draws.next(
            [tpe.outcome(draws.values[v], k, last=last, running=v in busy) for v, k in runs.items()]
        ):
            self.variants[draw.variant] = draw
            for trial in self._seeds_of(draw):
                self._add(trial)
            self._judged = tuple(self.trials)
            self.controls = self._choose_controls()
        self.write_manifest()

    def _add(self, trial: Trial) -> None:
        self.trials[trial.id] = trial
        self.known[trial.id] = read(trial, self.sweep)

    def _left(self) -> dict[str, Known]:
        """Those that are not out of it."""
        return {i: k for i, k in self.known.items() if not k.final and k.state != "diverged"}

    def _gathered(self) -> bool:
        """Whether the population has come to an exchange."""
        if self.population is None or self.running() or self.waiting():
            return False
        return self.population.due() and bool(self._left())

    # --- screening

    def _screened(self) -> bool:
        """Whether the first round is over and the second one still to be chosen."""
        return self.to_choose and not self.running() and not self.waiting()

    def _choose_shortlist(self) -> None:
        assert self.sweep.screening is not None
        assert self.screening_seed is not None
        sign, last = (1 if self.sweep.mode == "min" else -1), self.field().last
        first = {self.trials[i].variant: (self.trials[i], self.known[i]) for i in self._judged}
        scores = {
            variant: sign * known.scores[last]
            for variant, (_, known) in first.items()
            if known.state not in GONE and math.isfinite(known.scores.get(last, math.inf))
        }
        ranked = sorted((v for v in first if v in scores and v != self.baseline), key=scores.get)  # type: ignore[arg-type]
        costs = [self.weigh(trial) * known.hours for trial, known in first.values()]
        ended = [self.weigh(t) * k.hours for t, k in first.values() if k.step >= last and k.hours]
        runs = math.inf
        if self.sweep.budget and ended:
            runs = (self.sweep.budget.gpu_hours - sum(costs)) / (sum(ended) / len(ended))
        chosen = screening.choose(
            self.sweep.screening, ranked, self.screening_seed, self.sweep.budget, runs
        )
        self._confirm(chosen)
        now = {*self._judged, *(trial.id for trial in self._fresh(chosen))}
        for run_id in self.trials.keys() - now:  # of an earlier shortlist: what has run counts
            self.known[run_id].final = True

    def _confirm(self, chosen: dict[str, Any]) -> None:
        self.confirmation, self.to_choose = chosen, False
        for trial in self._fresh(chosen):
            self._add(trial)

    def _fresh(self, chosen: dict[str, Any]) -> list[Trial]:
        return [
            self.variants[variant].with_seed(seed)
            for seed in chosen["seeds"]
            for variant in (self.baseline, *chosen["variants"])
            if variant in self.variants
        ]

    # --- for people and for later

    def manifest(self) -> dict[str, Any]:
        """sweep.json: which runs belong to which variant, and how they are to be compared."""
        runs: dict[str, dict[str, str]] = {variant: {} for variant in self.variants}
        for trial in self.trials.values():
            runs[trial.variant][str(trial.seed)] = trial.id
        first = next(iter(self.trials.values()))
        more = self.draws.journal() if self.draws else {}
        if self.population:
            more["pbt"] = self.population.journal(self.finals())
        return {
            "name": first.experiment.name,
            "metric": self.sweep.metric,
            "mode": self.sweep.mode,
            "baseline": self.baseline,
            "rungs": list(self.rungs),
            "screening_seed": self.screening_seed,
            "confirmation": self.confirmation,
            "granted": dict(self._granted),
            "looks": list(self.looks),
            "variants": {
                variant: {
                    "label": trial.label,
                    "control": variant in self.controls,
                    "runs": runs[variant],
                }
                for variant, trial in self.variants.items()
            },
            **more,
        }

    def finals(self) -> dict[str, float]:
        """Score of each trial that is at its last step."""
        return scores_of(self._left(), next(iter(self.trials.values())).experiment.train.steps)

    def changed(self) -> bool:
        """Whether sweep.json does not say what it should."""
        return self.manifest() != self._written

    def write_manifest(self) -> None:
        """sweep.json, where it has changed; only with the sweep's lease."""
        if (found := self.manifest()) != self._written:
            text = json.dumps(found, indent=1) + "\n"
            storage.write_bytes(storage.join(self.folder, MANIFEST), text.encode())
            self._written = found

    def look(self) -> None:
        """Verdicts are about to be given: with another number of seeds than before, that is one
        more chance to find something by luck, which the intervals must allow for."""
        ended = [t for t in self.trials.values()
                 if self.known[t.id].step >= t.experiment.train.steps]  # fmt: skip
        seeds = max(collections.Counter(t.variant for t in ended).values(), default=0)
        if seeds > 1 and seeds not in self.looks:
            self.looks.append(seeds)
            self.write_manifest()

    def at_once(self) -> int:
        """Trials that may come to run at a time."""
        second = self.sweep.screening
        later = (second.shortlist + 1) * second.seeds if second else 0
        to_come = self.draws.left * self.sweep.seeds if self.draws else 0
        return max(len(self.trials) + to_come, later)

    def verdicts_of_rungs(self) -> dict[str, str]:
        """Run id: why it was stopped at the rung where it stands."""
        if self.population:
            here = f"at step {self.population.allowed()}, until the others are there"
            return {run_id: here for run_id, k in self.known.items() if k.state == "stopped"}
        if self.sweep.asha is None:
            return {}
        field, why = self.field(), {}
        for rung in self.rungs:
            for found in rungs.standing(field, rung, self.sweep.asha.reduction_factor):
                if not found.promoted:
                    why[found.variant] = f"at step {rung}: {found.text}"
        stopped = (t for t in self.trials.values() if self.known[t.id].state == "stopped")
        return {t.id: why[t.variant] for t in stopped if t.variant in why}
