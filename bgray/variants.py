"""The runs in folders as variants: which runs are seeds of one, and every item's score by step."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from bgray import storage
from bgray.config import ConfigError, digest
from bgray.problems import first_line, unknown
from bgray.records import ITEMS, read_info, read_lines, runs
from bgray.verdicts import Mode

MANIFEST = "sweep.json"
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is


class Run:
    """One run's folder, read as far as it is asked for.

    experiment, scores: as the properties, for those who keep what they have read.
    """

    def __init__(
        self,
        url: str,
        info: dict[str, Any],
        experiment: dict[str, Any] | None = None,
        scores: dict[int, dict[str, list[float | None]]] | None = None,
    ):
        self.url, self.info = url, info
        self.id = url.rsplit("/", 1)[-1]
        self._experiment = experiment
        if scores is not None:
            self.scores = scores
        self._steps: dict[str, set[int]] = {}

    @property
    def experiment(self) -> dict[str, Any]:
        """The resolved config; ConfigError where there is none."""
        if self._experiment is None:
            self._experiment = _experiment(self.url)
        return self._experiment

    @cached_property
    def scores(self) -> dict[int, dict[str, list[float | None]]]:
        """Step to score to one value per validation item; None where it has no meaning."""
        lines = read_lines(storage.join(self.url, ITEMS))
        return {
            line["step"]: {name: values for name, values in line.items() if name != "step"}
            for line in lines
        }

    def steps(self, metric: str) -> set[int]:
        """At which the metric has a value for at least one item."""
        if metric not in self._steps:  # a comparison asks thousands of times
            self._steps[metric] = {
                step
                for step, scores in self.scores.items()
                if any(value is not None for value in scores.get(metric, []))
            }
        return self._steps[metric]

    @property
    def lost(self) -> bool:
        """Diverged: it has no score to count. One that only got nowhere has, and counts."""
        return self.info.get("state") == "diverged"

    @property
    def ended(self) -> bool:
        return self.info.get("state") in ("finished", "stopped")


@dataclass(frozen=True)
class Variant:
    """An experiment without its seed, and its runs by seed."""

    id: str
    label: str
    runs: dict[int, Run] = field(default_factory=dict)
    control: bool = False
    """Never pruned, so that it can tell how well early scores foretell the last ones."""
    screening_seed: int | None = None
    """The seed by which a screening chose among the variants."""
    metric: str | None = None
    """What its sweep compares by, and which way is better."""
    mode: Mode | None = None
    looks: int = 1
    """At how many numbers of seeds the sweep has been closed: each is a chance to be fooled."""
    population: str | None = None
    """Of a member of a population (pbt): its first member's run."""


def find(named: Sequence[str]) -> tuple[list[Variant], str, str | None]:
    """(variants in order, a name for all of them, the baseline's id or None) of run folders,
    sweep folders, and <sweep folder>/<variant id or label>. ConfigError names what is none."""
    found: dict[str, Variant] = {}
    baselines = []
    for url in (url.rstrip("/") for url in named):
        variants, baseline = _of(url)
        baselines.append(baseline)
        for variant in variants:
            if variant.id in found:  # another seed of one that was named before
                variant.runs.update(found[variant.id].runs)
            found[variant.id] = variant
    order = _labelled(list(found.values()))
    known = [b for b in baselines if b in found]
    name = named[0].rstrip("/").rsplit("/", 1)[-1] if len(named) == 1 else "comparison"
    return order, name, known[0] if known else None


def _of(url: str) -> tuple[list[Variant], str | None]:
    if (info := read_info(url)) is not None:
        return _of_run(Run(url, info))
    if storage.exists(storage.join(url, MANIFEST)) or runs(url):
        variants, _, baseline = sweep_variants(url)
        return variants, baseline
    folder, _, wanted = url.rpartition("/")
    if folder and (storage.exists(storage.join(folder, MANIFEST)) or runs(folder)):
        variants, _, baseline = sweep_variants(folder)
        chosen = [v for v in variants if wanted in (v.id, v.label)]
        if chosen:
            return chosen, baseline
        labels = [v.label for v in variants]
        raise ConfigError(folder, [("", unknown(wanted, labels, "variant"))])
    text = "is no run, no sweep's folder and no <sweep's folder>/<variant>; give one of these"
    raise ConfigError(url, [("", text)])


def _of_run(run: Run) -> tuple[list[Variant], str | None]:
    listing = read_manifest(_parent(run.url))
    for id, entry in (listing or {"variants": {}})["variants"].items():
        if listing and run.id in entry["runs"].values():
            return [_listed(id, listing, {run.id: run})], listing.get("baseline")
    return [_variant(run)], None


def _listed(id: str, listing: dict[str, Any], there: dict[str, Run]) -> Variant:
    """A variant as sweep.json has it, with those of its runs that are there."""
    entry = listing["variants"][id]
    return Variant(
        id,
        entry["label"],
        {int(seed): there[run] for seed, run in entry["runs"].items() if run in there},
        entry.get("control", False),
        listing.get("screening_seed"),
        listing["metric"],
        listing["mode"],
        max(1, len(listing.get("looks", []))),
        _population(listing),
    )


def _population(listing: dict[str, Any]) -> str | None:
    if not listing.get("pbt"):
        return None
    return next((run for v in listing["variants"].values() for run in v["runs"].values()), None)


def sweep_variants(folder: str) -> tuple[list[Variant], str, str | None]:
    """(variants, the sweep's name, its baseline's id) of a sweep's folder; without sweep.json the
    run that started first is the baseline."""
    folder = folder.rstrip("/")
    there = {summary.id: Run(summary.url, summary.info) for summary in runs(folder)}
    return as_variants(folder.rsplit("/", 1)[-1], there, read_manifest(folder))


def as_variants(
    name: str, there: dict[str, Run], listing: dict[str, Any] | None
) -> tuple[list[Variant], str, str | None]:
    """As `sweep_variants`, of a sweep's runs by id and its sweep.json."""
    if listing is None:
        return _grouped(list(there.values())), name, None
    variants = [_listed(id, listing, there) for id in listing["variants"]]
    return variants, listing["name"], listing.get("baseline")


def read_manifest(folder: str) -> dict[str, Any] | None:
    """sweep.json as the last command has left it, None where there is none; ConfigError where it
    is damaged, or says other than which runs there are and how they are compared."""
    way_out = "delete it: runs stay, but draws, populations and shortlists are chosen anew"
    url = storage.join(folder, MANIFEST)
    found = storage.read_json(url, way_out)
    if found is not None and (why := _fault(found)):
        raise ConfigError(url, [("", f"is damaged ({why}); {way_out}")])
    return found


def _fault(listing: dict[str, Any]) -> str:
    """What of a manifest's is not as it is read here; empty where all is."""
    for key in ("name", "metric", "mode"):
        if not isinstance(listing.get(key), str):
            return f"no {key}"
    if listing["mode"] not in ("min", "max"):
        return f"mode {listing['mode']!r}"
    if not isinstance(listing.get("variants"), dict) or not listing["variants"]:
        return "no variants"
    for id, entry in listing["variants"].items():
        runs = entry.get("runs") if isinstance(entry, dict) else None
        if not isinstance(runs, dict) or not isinstance(entry.get("label"), str):
            return f"variant {id} has no label or no runs"
        if not all(re.fullmatch(r"-?\d+", s) and isinstance(r, str) for s, r in runs.items()):
            return f"variant {id} has a run without a seed"
    if not isinstance(listing.get("looks", []), list):
        return "looks is no list"
    return ""


def _parent(url: str) -> str:
    return url.rpartition("/")[0] or "."


# --- without sweep.json


def _experiment(url: str) -> dict[str, Any]:
    try:
        return read_experiment(storage.join(url, "experiment.yaml"))
    except FileNotFoundError:
        raise ConfigError(url, [("", "is no run: it has no experiment.yaml")]) from None


def read_experiment(path: str) -> dict[str, Any]:
    """What an experiment.yaml holds, as plain data; ConfigError where it is damaged."""
    try:
        found, why = yaml.load(storage.read_bytes(path), SafeLoader), "no config"
    except yaml.YAMLError as error:
        found, why = None, first_line(error)
    if isinstance(found, dict) and isinstance(found.get("train"), dict):
        return found
    raise ConfigError(path, [("", f"is damaged ({why}); move its folder away")])


def _variant(run: Run) -> Variant:
    """A variant of one run; its label is filled in beside others."""
    raw = run.experiment
    seed = raw["train"]["seed"]
    raw = {key: value for key, value in raw.items() if key not in ("runtime", "name")}
    raw["train"] = {key: value for key, value in raw["train"].items() if key != "seed"}
    raw["data"] = {**raw["data"], "path": run.info.get("data_hash")}
    id = run.info.get("variant") or digest(raw)[:12]
    return Variant(id, "", {seed: run})


def _grouped(there: list[Run]) -> list[Variant]:
    def began(run: Run) -> str:
        return str((run.info.get("attempts") or [{}])[0].get("started", ""))

    found: dict[str, Variant] = {}
    for run in sorted(there, key=lambda run: (began(run), run.id)):
        variant = _variant(run)
        found.setdefault(variant.id, variant).runs.update(variant.runs)
    return _labelled(list(found.values()))


def _labelled(variants: list[Variant]) -> list[Variant]:
    """With what differs between them as label, where there is none yet."""
    if all(v.label for v in variants):
        return variants
    flat = [flattened(next(iter(v.runs.values())).experiment) if v.runs else {} for v in variants]
    keys = sorted(
        {
            key
            for one in flat
            for key in one
            if any(key not in o or o[key] != one[key] for o in flat)
        }
    )
    keys = [key for key in keys if key != "train.seed" and not key.startswith(("runtime.", "name"))]

    def label(one: dict[str, Any]) -> str:
        parts = (
            f"{k.removeprefix('model.').removeprefix('train.')}={one[k]}" for k in keys if k in one
        )
        return " ".join(parts) or "base"

    return [
        v
        if v.label
        else Variant(v.id, label(f), v.runs, v.control, v.screening_seed, v.metric, v.mode)
        for v, f in zip(variants, flat, strict=True)
    ]


def flattened(raw: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as dotted paths."""
    if not isinstance(raw, dict):
        return {path: raw}
    return {
        k: v
        for key, value in raw.items()
        for k, v in flattened(value, f"{path}.{key}" if path else str(key)).items()
    }


# --- which score, and which way


def direction(
    variants: Sequence[Variant], evaluated: Sequence[Run], metric: str | None, where: str
) -> tuple[str, Mode]:
    """(the score to compare by, which way is better): the sweep's, or else the task's first."""
    chosen = next((v for v in variants if v.metric and v.mode), None)
    known = list(
        dict.fromkeys(name for run in evaluated for s in run.scores.values() for name in s)
    )
    if metric is not None and metric not in known:
        raise ConfigError(where, [("--metric", unknown(metric, known, "metric"))])
    if chosen and chosen.metric and chosen.mode and metric in (None, chosen.metric):
        return chosen.metric, chosen.mode
    for run in evaluated:
        if modes := run.info.get("scores"):
            metric = metric or next(iter(modes))
            return metric, modes[metric]
    # Runs of an older version do not say. Imported here: the task needs torch.
    from bgray.build import build_task
    from bgray.experiment import resolve

    first = evaluated[0]
    scores = build_task(
        resolve(first.experiment, storage.join(first.url, "experiment.yaml"))
    ).scores
    metric = metric or next(iter(scores))
    return metric, scores[metric]
