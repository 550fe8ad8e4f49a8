"""Which trials a sweep has: every combination of its search, resolved and checked beforehand."""

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bgray.build import build_task
from bgray.config import (
    SWEEP_KEYS,
    ConfigError,
    Experiment,
    Sweep,
    split_sweep,
)
from bgray.document import set_path
from bgray.experiment import absolute, read_overridden, resolve, run_url


@dataclass(frozen=True)
class Trial:
    """One resolved experiment of a sweep."""

    id: str
    label: str
    """What differs from the base."""
    experiment: Experiment
    url: str


def expand(source: str, overrides: tuple[str, ...] = ()) -> tuple[Sweep, list[Trial]]:
    """Every trial of a sweep file, fully checked before anything starts; ConfigError names the
    trial it is about."""
    sweep = split_sweep(read_overridden(source, overrides), source)
    _refuse_paths(sweep, overrides, source)
    trials: dict[str, Trial] = {}
    for label, changes in combinations(sweep, source):
        raw = copy.deepcopy(sweep.base)
        for path, value in changes.items():
            set_path(raw, path, copy.deepcopy(value))
        experiment = absolute(resolve(raw, f"{source} [{label}]" if changes else source))
        url = run_url(experiment)
        trial = Trial(url.rsplit("/", 1)[-1], label, experiment, url)
        if trial.id in trials:  # the same experiment by another path: once is enough
            trial = dataclasses.replace(
                trials[trial.id], label=f"{trials[trial.id].label} = {label}"
            )
        trials[trial.id] = trial
    scores = build_task(next(iter(trials.values())).experiment).scores
    metric = next(iter(scores)) if sweep.metric == "auto" else sweep.metric
    mode = scores.get(metric, "auto") if sweep.mode == "auto" else sweep.mode
    sweep = dataclasses.replace(sweep, metric=metric, mode=mode)
    _check(sweep, list(trials.values()), source)
    return sweep, list(trials.values())


def _refuse_paths(sweep: Sweep, overrides: tuple[str, ...], source: str) -> None:
    """What varies must be part of the experiment, and not be overridden from outside as well."""
    given = {item.partition("=")[0].strip() for item in overrides}
    problems = []
    for where, paths in {"search": sweep.search, **sweep.variants}.items():
        for path in paths:
            top = path.split(".")[0]
            if top in SWEEP_KEYS or top in ("runtime", "name"):
                problems.append((f"{where}.{path}", f"'{top}' cannot vary within a sweep"))
            elif any(_overlap(path, other) for other in given):
                problems.append(
                    (f"--set {path}", f"{where} sets it for each trial; change it there")
                )
    if problems:
        raise ConfigError(source, problems)


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted path lies within the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def combinations(sweep: Sweep, source: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, {dotted path: value}) of each trial: variants x grid x random draws; one empty block
    for no search."""
    rng = np.random.default_rng(sweep.sample_seed)
    grids: dict[str, list[Any]] = {}
    draws: dict[str, Any] = {}
    problems = []
    for path, spec in sweep.search.items():
        try:
            kind, values = ("grid", spec) if isinstance(spec, list) else next(iter(spec.items()))
            if isinstance(spec, dict) and len(spec) != 1:
                raise ValueError(f"expected one of {', '.join(DRAWS)} or grid, got {sorted(spec)}")
            if not isinstance(values, list) or not values:
                raise ValueError(f"expected a list with values after '{kind}', got {values!r}")
            if kind == "grid":
                grids[path] = values
            else:
                draws[path] = _drawer(kind, values)
        except (ValueError, StopIteration) as error:
            problems.append((f"search.{path}", str(error) or "is empty"))
    if problems:
        raise ConfigError(source, problems)
    # Drawn once: every variant and grid cell gets the same points, so that they can be compared.
    points = [
        {path: draw(rng) for path, draw in draws.items()}
        for _ in range(sweep.samples if draws else 1)
    ]
    found = []
    for name, block in (sweep.variants or {"": {}}).items():
        for cell in itertools.product(*grids.values()):
            for drawn in points:
                searched = {**dict(zip(grids, cell, strict=True)), **drawn}
                label = " ".join(
                    filter(None, [name, *(f"{_short(p)}={_text(v)}" for p, v in searched.items())])
                )
                found.append((label or "base", {**block, **searched}))
    return found


def _drawer(kind: str, values: list[Any]) -> Callable[[np.random.Generator], Any]:
    if kind not in DRAWS:
        raise ValueError(f"unknown kind '{kind}'; there is grid, {', '.join(DRAWS)}")
    if kind == "choice":
        return lambda rng: values[int(rng.integers(len(values)))]
    if len(values) != 2 or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(
            f"expected two numbers [low, high], got {values!r} (write 1.0e-4: YAML reads 1e-4 "
            "as text)"
        )
    low, high = values
    if not all(math.isfinite(v) and abs(v) < 2**63 for v in values):
        raise ValueError(f"expected finite numbers, got {values!r}")
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        raise ValueError(f"expected two whole numbers, got {values!r}")
    if low >= high or (kind == "loguniform" and low <= 0):
        raise ValueError(
            f"expected {'0 < ' if kind == 'loguniform' else ''}low < high, got {values!r}"
        )
    return lambda rng: DRAWS[kind](rng, low, high)


DRAWS = {
    "choice": None,
    "uniform": lambda rng, low, high: float(f"{rng.uniform(low, high):.6g}"),
    "loguniform": lambda rng, low, high: float(
        f"{math.exp(rng.uniform(math.log(low), math.log(high))):.6g}"
    ),
    "randint": lambda rng, low, high: int(rng.integers(low, high)),
}
"""Kinds of random entries; numbers are rounded to six digits so that what is written is what
ran."""


def _short(path: str) -> str:
    return path.removeprefix("model.").removeprefix("train.")


def _text(value: Any) -> str:
    return (
        json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict) else str(value)
    )


def _check(sweep: Sweep, trials: list[Trial], source: str) -> None:
    problems = []
    scores = build_task(trials[0].experiment).scores
    if sweep.metric not in scores:
        problems.append(
            ("metric", f"'{sweep.metric}' is not scored by this task; there is {', '.join(scores)}")
        )
    elif scores[sweep.metric] != sweep.mode:
        problems.append(
            (
                "mode",
                f"{sweep.metric} is better when {scores[sweep.metric]}imal: write mode: "
                f"{scores[sweep.metric]}",
            )
        )
    if sweep.asha:
        longest = max(trial.experiment.train.steps for trial in trials)
        if sweep.asha.grace_steps >= longest:
            problems.append(
                (
                    "asha.grace_steps",
                    f"{sweep.asha.grace_steps} is not below train.steps = {longest}: nothing "
                    "would be stopped",
                )
            )
        for trial in trials:
            if trial.experiment.validation.every > sweep.asha.grace_steps:
                problems.append(
                    (
                        "validation.every",
                        f"{trial.experiment.validation.every} is above asha.grace_steps = "
                        f"{sweep.asha.grace_steps}: no score at the first rung",
                    )
                )
    if problems:
        raise ConfigError(source, list(dict.fromkeys(problems)))
