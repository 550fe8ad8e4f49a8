"""Which trials a sweep has: every combination of its search, with each of its seeds, resolved and
checked beforehand."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bgray import pbt, storage, tpe
from bgray.build import build_task
from bgray.config import ConfigError, Experiment
from bgray.document import set_path
from bgray.draws import Entry, entry
from bgray.experiment import absolute, data_hash, read_overridden, resolve
from bgray.problems import unknown
from bgray.rungs import rung_steps
from bgray.sweep_config import SWEEP_KEYS, Sweep, split_sweep


@dataclass(frozen=True)
class Trial:
    """One resolved experiment of a sweep: a variant with a seed."""

    id: str
    label: str
    """What differs from the base; the same for all seeds of a variant."""
    experiment: Experiment
    url: str
    variant: str
    """Id of the variant."""
    data_hash: str

    @property
    def seed(self) -> int:
        return self.experiment.train.seed

    @property
    def title(self) -> str:
        return f"{self.label} seed {self.seed}"

    def with_seed(self, seed: int) -> "Trial":
        """The same variant with another seed."""
        train = dataclasses.replace(self.experiment.train, seed=seed)
        return make_trial(
            self.label, dataclasses.replace(self.experiment, train=train), self.data_hash
        )


def make_trial(label: str, experiment: Experiment, data: str) -> Trial:
    """data: the hash of its data."""
    run_id = experiment.identity(data)
    url = storage.join(experiment.runtime.results, experiment.name, run_id)
    return Trial(run_id, label, experiment, url, experiment.variant_identity(data), data)


def expand(source: str, overrides: tuple[str, ...] = ()) -> tuple[Sweep, list[Trial]]:
    """Every trial of a sweep file, fully checked before anything starts: all variants with the
    first seed, then with the second; of a screening, those with its first seed. ConfigError names
    the trial it is about."""
    sweep, experiments = resolved(source, overrides)
    variants: dict[str, Trial] = {}
    for label, experiment in experiments:
        experiment = absolute(experiment)
        trial = make_trial(label, experiment, data_hash(experiment))
        if trial.id in variants:  # the same experiment by another path: once is enough
            _refuse_lengths(variants[trial.id], trial, source)
            trial = dataclasses.replace(
                variants[trial.id], label=f"{variants[trial.id].label} = {label}"
            )
        variants[trial.id] = trial
    scores = build_task(next(iter(variants.values())).experiment).scores
    metric = next(iter(scores)) if sweep.metric == "auto" else sweep.metric
    mode = scores.get(metric, "auto") if sweep.mode == "auto" else sweep.mode
    sweep = dataclasses.replace(sweep, metric=metric, mode=mode)
    _check(sweep, list(variants.values()), source)
    if sweep.baseline is None:
        sweep = dataclasses.replace(sweep, baseline=next(iter(variants.values())).label)
    return sweep, [
        trial if number == 0 else trial.with_seed(trial.seed + number)
        for number in range(sweep.seeds)
        for trial in variants.values()
    ]


def _refuse_lengths(one: Trial, other: Trial, source: str) -> None:
    steps = sorted(trial.experiment.train.steps for trial in (one, other))
    if steps[0] != steps[1]:
        text = f"a run of {steps[0]} steps is the beginning of one of {steps[1]}, unless its "
        text += "schedule is wsd: train the longer one, and compare with --at"
        raise ConfigError(source, [("train.steps", text)])


def resolved(
    source: str, overrides: tuple[str, ...] = ()
) -> tuple[Sweep, list[tuple[str, Experiment]]]:
    """The sweep and, with its label, each experiment of it that is known beforehand, checked
    without a look at their data."""
    sweep = split_sweep(read_overridden(source, overrides), source)
    _refuse_paths(sweep, overrides, source)
    if sweep.pbt:
        return sweep, population(sweep, source)
    found = []
    for label, changes in combinations(sweep, source):
        where = f"{source} [{label}]" if changes else source
        found.append((label, changed(sweep.base, changes, where)))
    if sweep.sampler == "tpe":
        _check_space(sweep, source)
    return sweep, found


def changed(base: dict[str, Any], changes: dict[str, Any], source: str) -> Experiment:
    """The base with some values set by their dotted paths, checked."""
    raw = copy.deepcopy(base)
    for path, value in changes.items():
        set_path(raw, path, copy.deepcopy(value))
    return resolve(raw, source)


def drawn(sweep: Sweep, base: Trial, values: dict[str, Any]) -> Trial:
    """One draw of a sweep's search, with the base's seed; ConfigError where it cannot be built."""
    label = label_of(values)
    where = f"{base.experiment.name} [{label}]"
    experiment = absolute(changed(sweep.base, values, where))
    data = data_hash(experiment)
    if data != base.data_hash:
        raise ConfigError(where, [("search", "changes the data, and with them the scores")])
    return make_trial(label, experiment, data)


def population(sweep: Sweep, source: str) -> list[tuple[str, Experiment]]:
    """The members: the base, each with its own seed and first draw."""
    assert sweep.pbt is not None
    entries = space(sweep.pbt.vary, source, "pbt.vary")
    base = changed(sweep.base, {}, source)
    if problems := pbt.problems(sweep, entries, base):
        raise ConfigError(source, problems)
    for path, found in entries.items():  # whatever it comes to is somewhere between
        for value in found.values:
            changed(sweep.base, pbt.changes({path: value}, base), f"{source} [pbt.vary.{path}]")
    return [
        (f"member {i}", member(sweep, base, pbt.first(entries, sweep.sample_seed, i), i))
        for i in range(sweep.pbt.population)
    ]


def member(sweep: Sweep, base: Experiment, values: dict[str, Any], number: int) -> Experiment:
    """The base with the values and the seed of one member."""
    seed = {"train.seed": base.train.seed + number}
    return changed(sweep.base, pbt.changes(values, base) | seed, f"{base.name} [member {number}]")


def _check_space(sweep: Sweep, source: str) -> None:
    """What TPE is to draw from: a path that no value fits is a mistake, which its draws would only
    stumble over later."""
    if problems := tpe.problems(sweep):
        raise ConfigError(source, problems)
    for path, found in space(sweep.search, source).items():
        errors = []
        for value in found.values:
            try:
                changed(sweep.base, {path: value}, f"{source} [{label_of({path: value})}]")
            except ConfigError as error:
                errors.append(error)
        if len(errors) == len(found.values):
            raise errors[0]


def _refuse_paths(sweep: Sweep, overrides: tuple[str, ...], source: str) -> None:
    """What varies must be part of the experiment, and not be overridden from outside as well."""
    given = {item.partition("=")[0].strip() for item in overrides}
    problems = []
    varied = {"search": sweep.search, "pbt.vary": sweep.pbt.vary if sweep.pbt else {}}
    for where, paths in {**varied, **sweep.variants}.items():
        for path in paths:
            top = path.split(".")[0]
            if top in SWEEP_KEYS or top in ("runtime", "name"):
                problems.append((f"{where}.{path}", f"'{top}' cannot vary within a sweep"))
            elif path == "train.seed":
                text = "seeds are no variants: write `seeds: 3` for three trials of each variant"
                problems.append((f"{where}.{path}", text))
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
    entries = space(sweep.search, source)
    if sweep.sampler == "tpe":
        return [("base", {})]
    rng = np.random.default_rng(sweep.sample_seed)
    grids = {path: entry.values for path, entry in entries.items() if entry.kind == "grid"}
    draws = {path: entry for path, entry in entries.items() if entry.kind != "grid"}
    # Drawn once: every variant and grid cell gets the same points, so that they can be compared.
    points = [
        {path: entry.draw(rng) for path, entry in draws.items()}
        for _ in range(sweep.samples if draws else 1)
    ]
    found = []
    for name, block in (sweep.variants or {"": {}}).items():
        for cell in itertools.product(*grids.values()):
            for drawn in points:
                searched = {**dict(zip(grids, cell, strict=True)), **drawn}
                label = " ".join(filter(None, [name, label_of(searched)]))
                found.append((label or "base", {**block, **searched}))
    return found


def space(
    search: Mapping[str, dict[str, Any] | list[Any]], source: str, where: str = "search"
) -> dict[str, Entry]:
    """What is written at `where`, by dotted path; ConfigError with all that is wrong in it."""
    found, problems = {}, []
    for path, spec in search.items():
        try:
            found[path] = entry(spec)
        except ValueError as error:
            problems.append((f"{where}.{path}", str(error)))
    if problems:
        raise ConfigError(source, problems)
    return found


def label_of(values: dict[str, Any]) -> str:
    """What is searched, for people: "optim.lr=0.1 kernels=[7]"."""
    return " ".join(f"{_short(path)}={_text(value)}" for path, value in values.items())


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
    if sweep.pbt is None and len({trial.seed for trial in trials}) > 1:
        text = "differs between variants: seeds are no variants, write `seeds: 3` for three of each"
        problems.append(("train.seed", text))
    labels = [trial.label for trial in trials]
    if sweep.baseline is not None and sweep.baseline not in labels:
        problems.append(("baseline", unknown(sweep.baseline, labels)))
    if sweep.screening and sweep.seeds > 1:
        text = "with a screening, the number of seeds is screening.seeds (the first round has one)"
        problems.append(("seeds", text))
    if sweep.asha and len({trial.experiment.train.steps for trial in trials}) > 1:
        text = "varies: rungs judge variants of one length; set asha: null, or one length for all"
        problems.append(("train.steps", text))
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


def rungs(sweep: Sweep, trials: list[Trial]) -> tuple[int, ...]:
    """Steps at which variants are judged; none without ASHA."""
    if sweep.asha is None:
        return ()
    every = max(trial.experiment.validation.every for trial in trials)
    last = max(trial.experiment.train.steps for trial in trials)
    return rung_steps(sweep.asha.grace_steps, sweep.asha.reduction_factor, every, last)
