"""What a run's folder and its console are told: facts, lines by step, warnings, how it ended."""

import contextlib
import json
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from bgray import guards, retries, storage
from bgray.build import build_task
from bgray.config import Experiment
from bgray.context import Context
from bgray.evaluation import Scores, means, without_nan
from bgray.experiment import Prepared, build_recipe
from bgray.feed_cache import UnitCache
from bgray.lineage import identify
from bgray.loop import NotFinite
from bgray.losses import far_apart
from bgray.probes import Clock
from bgray.records import ITEMS, METRICS, TIMING, Run, evaluations, read_lines, reason

KEPT = 20
"""Different warnings in run.json, the last ones; what guards said is never dropped."""
KINDS = (
    guards.SILENT,
    guards.COLLAPSE,
    guards.STAGNATION,
    guards.EXPLODING,
    guards.FAR_APART,
    guards.NO_NUMBER,
    guards.NO_CONVERGENCE,
)


class Logbook:
    """Of one try of a run; on ranks above 0 (`run` is None) it remembers and writes nothing."""

    def __init__(
        self, experiment: Experiment, context: Context, url: str, run: Run | None, clock: Clock
    ):
        self.experiment, self.context, self.url = experiment, context, url
        self.run, self.clock = run, clock
        self.task = build_task(experiment)
        self.metric, self.mode = next(iter(self.task.scores.items()))
        self.earlier: list[tuple[int, dict[str, Any]]] = []
        """Evaluations of an earlier try, up to the checkpoint that this one goes on from."""
        self.latest: dict[str, Any] = {}
        self.best: tuple[int, float] | None = None
        """Step and value of the best evaluation so far by the task's first score."""
        self.feed_cache: UnitCache | None = None
        self._cached_before: dict[str, Any] = {}
        self._scores: list[float] = []
        self._baseline: float | None = None
        self._logged = {name: deque[float](maxlen=guards.LINES + guards.HELD) for name in LOGGED}
        self.guarded: dict[str, str] | None = {}
        """What guards saw of the sound at the last evaluation, by kind; for the checkpoint. None:
        not known, for an older version wrote it."""

    # --- beginning ---

    def recall(self, step: int, guarded: dict[str, str] | None = None) -> None:
        """What an earlier try had reached when it wrote the checkpoint of `step`, `guarded` in
        it."""
        self.guarded = guarded if step else {}
        self.earlier = [(s, m) for s, m in evaluations(self.url) if s <= step]
        for _, metrics in self.earlier:
            self.learn(metrics)
        if self.run is not None and step:
            for line in read_lines(storage.join(self.url, METRICS)):
                if line["step"] <= step:
                    self._remember(line)

    def begin(self, step: int, baseline: Scores, **facts: Any) -> None:
        """baseline: the unprocessed input's scores by item."""
        known = means(baseline)
        self._baseline = known.get(self.metric)
        if self.run is None:
            return
        info, train = self.run.info, self.experiment.train
        self._cached_before = info.get("feed_cache", {}) if step else {}
        if step < train.steps:  # perhaps it was to be shorter, and had ended
            said = {k: s for k, s in info.get("guards", {}).items() if k != guards.NO_CONVERGENCE}
            old = [w for w in info.get("warnings", []) if not w.startswith(guards.NO_CONVERGENCE)]
            facts |= {"converged": None, "guards": said, "warnings": old}
        self.run.update(
            name=self.experiment.name,
            steps=train.steps,
            seed=train.seed,
            variant=self.experiment.variant_identity(self.run.data_hash),
            data_hash=self.run.data_hash,
            scores=dict(self.task.scores),
            baseline=known,
            baseline_items=without_nan(baseline),
            device=str(self.context.device),
            packed=self.context.packed,
            vram_limit_gib=self.context.vram_gib,
            workers=self.context.world,
            threads=self.context.threads,
            feed=self.context.feed.kind,
            feed_reason=self.context.feed.reason,
            step=step,
            metrics=self.latest,
            **facts,
        )

    # --- lines by step ---

    def train_line(self, step: int, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        line = {"step": step, **values}
        self.run.append(METRICS, line)
        self.run.append(TIMING, {"step": step, **self._timing()})
        self._remember(line)
        parts = {
            name: abs(pick.options["weight"] * values[f"loss_{name}"])
            for name, pick in self.experiment.loss.items()
        }
        self.guard(guards.FAR_APART, step, far_apart(parts))
        for name, logged in self._logged.items():
            self.guard(guards.EXPLODING, step, guards.exploding(name, list(logged)))

    def items_line(self, step: int, scores: Scores) -> None:
        if self.run is not None:
            self.run.append(ITEMS, {"step": step, **without_nan(scores)})
            self.guard(guards.NO_NUMBER, step, guards.no_number(scores))

    def validation_line(self, step: int, values: dict[str, float], heard: np.ndarray) -> None:
        """heard: the signals' mean products by item, as in `guards.silent`."""
        if self.run is not None:
            self.run.append(METRICS, {"step": step, "val": values})
            self.run.flush()
        self.learn({"step": step, **values})
        if self.run is not None:
            self._listen(step, heard)

    def learn(self, metrics: dict[str, Any]) -> None:
        """Of an evaluation, this try's or an earlier one's."""
        self.latest = metrics
        self._scores.append(metrics.get(self.metric, math.nan))
        self._rank(metrics)

    def choose_from(self, step: int) -> None:
        """Let `best` be one of the evaluations from `step` on: earlier ones have left no state."""
        self.best = None
        for evaluated, metrics in self.earlier:
            if evaluated >= step:
                self._rank(metrics)

    def _rank(self, metrics: dict[str, Any]) -> None:
        score = metrics.get(self.metric, math.nan)
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(score) and (self.best is None or sign * score > sign * self.best[1]):
            self.best = metrics["step"], score

    @property
    def best_is_latest(self) -> bool:
        """Whether no evaluation before the last one was as good."""
        return self.best is not None and self.best[0] == self.latest.get("step")

    def _remember(self, line: dict[str, Any]) -> None:
        for name, logged in self._logged.items():
            if line.get(name) is not None:
                logged.append(line[name])

    def _listen(self, step: int, heard: np.ndarray) -> None:
        names, steps = self.task.sources, self.experiment.train.steps
        seen = {
            guards.SILENT: guards.silent(heard, names),
            guards.COLLAPSE: guards.collapsed(heard, names, mixture=self.task.stems),
        }
        for kind, text in seen.items():
            # Twice, for a net may begin there; masks begin as the mixture, and take their time.
            early = kind == guards.COLLAPSE and step < steps / 2
            if step >= steps or ((self.guarded or {}).get(kind) and not early):
                self.guard(kind, step, text)
        self.guarded = seen
        text = guards.stagnation(self._scores, self._baseline, self.mode)
        self.guard(guards.STAGNATION, step, f"{self.metric}: {text}" if text else "")

    # --- warnings ---

    def guard(self, kind: str, step: int, text: str) -> None:
        """Say it once in a run's life, if there is anything to say."""
        if self.run is None or not text or kind in self.run.info.get("guards", {}):
            return
        self.run.info["guards"] = {**self.run.info.get("guards", {}), kind: step}
        self.warn(f"{kind} at step {step}: {text}")

    def warn(self, text: str) -> None:
        self.context.warn(text)
        if self.run is not None:
            self.run.update(warnings=self._warnings(text))

    def goes_without(self, choice: str, why: str) -> None:
        """A choice of bgray.choices that did not work here."""
        if self.run is not None:
            self.run.info["choices"][choice] = False
        self.warn(f"runtime.{choice} did not work, this run goes on without: {why}")

    def _warnings(self, *new: str) -> list[str]:
        """With what remote storage did in the meantime."""
        assert self.run is not None
        noted = self.feed_cache.notes if self.feed_cache else ()
        found = [*self.run.info.get("warnings", []), *retries.incidents(), *noted, *new]
        found = list(dict.fromkeys(reversed(found)))[::-1]  # each once, where it came last
        kept = [text for text in found if not text.startswith(KINDS)][-KEPT:]
        return [text for text in found if text.startswith(KINDS) or text in kept]

    # --- how it goes and ends ---

    def so_far(self, step: int) -> None:
        if self.run is not None:
            self.run.update(step=step, **self._facts())

    def finish(self, state: str, step: int | None, why: str | None, **facts: Any) -> None:
        """For good, or until somebody goes on."""
        if self.run is None:
            return
        self.run.flush()
        if state == "diverged":
            facts["converged"] = False
        elif state == "finished" and self.latest.get("step") == self.experiment.train.steps:
            facts["converged"] = self._converged()
        known = {} if step is None else {"step": step}
        facts = {**self._facts(), **known, **facts}
        self.run.update(state=state, reason=why, **facts)

    def _converged(self) -> bool:
        assert self.run is not None
        info = self.run.info
        if self.guarded is None and info.get("converged") is not None:
            return info["converged"]  # as an older version found
        step, score = self.latest["step"], self.latest.get(self.metric)
        text = guards.unconverged(self.metric, score, self._baseline, self.mode)
        self.guard(guards.NO_CONVERGENCE, step, text)
        # Where what was heard at the end is not known, what was said on the way has to do.
        said = [kind in info.get("guards", {}) for kind in (guards.SILENT, guards.COLLAPSE)]
        return not text and not any(said if self.guarded is None else self.guarded.values())

    def _facts(self) -> dict[str, Any]:
        timing = {**self._timing(), "packed": self.context.packed}
        facts = {"metrics": self.latest, "timing": timing, "warnings": self._warnings()}
        if self.feed_cache is not None:
            facts["feed_cache"] = self.feed_cache.record(self._cached_before)
        return facts

    def _timing(self) -> dict[str, Any]:
        shared = {"packed": True} if self.context.packed else {}
        return {**self.clock.summary(), **shared}

    def diverged(self, error: NotFinite, prepared: Prepared) -> None:
        """diverged.json: at which batch, made of what, and what was logged there."""
        if self.run is None:
            return
        recipe = build_recipe(self.experiment, prepared)
        facts: dict[str, Any] = {
            "step": error.step,
            "batch": error.step - 1,
            "seed": error.seed,
            "unit": recipe.unit_of(error.step - 1),
            "workers": self.context.world,
            "not_finite": sorted({n for v in error.values for n in v if not math.isfinite(v[n])}),
            "values": [dict(_spelled(values)) for values in error.values],
            "shards": prepared.url,
        }
        try:
            facts["rows"] = identify(recipe, error.step - 1, self.context.world)
        except (OSError, ValueError) as unreadable:
            facts["rows_unreadable"] = reason(unreadable)
        # How it ended is worth more than this; a full disk takes both.
        with contextlib.suppress(OSError):
            text = json.dumps(facts, indent=1)
            storage.write_bytes(storage.join(self.url, "diverged.json"), text.encode() + b"\n")


LOGGED = tuple(guards.TIMES)


def _spelled(values: dict[str, float]) -> Iterator[tuple[str, float | str]]:
    """For JSON, which has no NaN and no infinity."""
    for name, value in values.items():
        yield name, value if math.isfinite(value) else str(value)
