"""From YAML to a checked experiment with its data: what it reads, where it writes, what it
would do."""

import dataclasses
from pathlib import Path
from typing import Any

from bgray import data, shards, storage
from bgray.band import VERSION as BAND_VERSION
from bgray.build import (
    TABLES,
    build_augment,
    build_task,
    meta_model,
    num_parameters,
    validation_segment,
)
from bgray.config import ConfigError, Experiment, digest, parse, task_entry
from bgray.conflicts import conflicts
from bgray.document import override, read
from bgray.optim import PRESETS
from bgray.problems import unknown
from bgray.tasks import TASKS


def load(source: str, overrides: tuple[str, ...] = ()) -> Experiment:
    """The experiment in a YAML file (a sweep's base, when it has a search), fully checked."""
    return resolve(read_overridden(source, overrides), source)


def read_overridden(source: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file with --set applied. A part of the task's default loss that is changed, by --set or
    by the search, is changed within it: `loss.l1=5` keeps the other parts."""
    raw = read(source)
    paths = [item.partition("=")[0] for item in overrides]
    variants = raw.get("variants")
    blocks = [raw.get("search"), *(variants.values() if isinstance(variants, dict) else ())]
    paths += [path for block in blocks if isinstance(block, dict) for path in block]
    if "loss" not in raw and any(str(path).startswith("loss.") for path in paths):
        raw["loss"] = dict(getattr(task_entry(raw, TASKS), "default_loss", {}))
    override(raw, overrides, source)
    return raw


def resolve(raw: dict[str, Any], source: str) -> Experiment:
    """Parse and check across sections; ConfigError with every problem found."""
    experiment = parse(_with_preset(raw, source), TABLES, source)
    problems = list(conflicts(experiment))
    if problems:
        raise ConfigError(source, problems)
    return experiment


def _with_preset(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """`optim: {preset: muon_001, lr: ...}`: a log's settings, and what is said beside them."""
    optim = raw.get("optim")
    if not isinstance(optim, dict) or "preset" not in optim:
        return raw
    name = str(optim["preset"])
    if name not in PRESETS:
        raise ConfigError(source, [("optim.preset", unknown(name, PRESETS))])
    if "name" in optim:
        raise ConfigError(source, [("optim", f"give a name or a preset ({name}), not both")])
    own = {key: value for key, value in optim.items() if key != "preset"}
    found = {**PRESETS[name], **own}
    rates = ("lr" in own and "adamw_lr" in PRESETS[name], "adamw_lr" not in own)
    if all(rates) and isinstance(own["lr"], float):
        # A search over the rate must not change the ratio of the two.
        found["adamw_lr"] *= own["lr"] / PRESETS[name]["lr"]
    return {**raw, "optim": found}


def absolute(experiment: Experiment) -> Experiment:
    """Local folders as absolute paths, for workers have other working directories."""

    def full(path: str) -> str:
        return path if storage.is_remote(path) else str(Path(path).expanduser().absolute())

    runtime = dataclasses.replace(
        experiment.runtime,
        results=full(experiment.runtime.results),
        cache=full(experiment.runtime.cache),
    )
    data = experiment.data
    if data.path != "builtin":
        data = dataclasses.replace(data, path=full(data.path))
    return dataclasses.replace(experiment, runtime=runtime, data=data)


# --- data


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The data an experiment reads: where it is and what is in it."""

    url: str
    manifest: shards.Manifest


def prepare_data(
    experiment: Experiment, *, workers: int | None = 0, progress: Any = None
) -> Prepared:
    """The experiment's shards; renders built-in music on first use. ConfigError when they do not
    fit the experiment.

    workers: passed to shards.prepare (0: this process, null: Ray Data).
    """
    task, config = build_task(experiment), experiment.data
    if config.path == "builtin":
        options = _builtin_options(experiment)
        url = storage.join(experiment.runtime.cache, f"builtin-{_builtin_hash(options)[:12]}")
        prepared = Prepared(
            url, shards.prepare("builtin", url, options, workers=workers, progress=progress)
        )
    else:
        prepared = Prepared(config.path, shards.read_manifest(config.path))
    problems = list(_data_problems(experiment, task, prepared.manifest))
    if problems:
        raise ConfigError(prepared.url, problems)
    return prepared


def _builtin_options(experiment: Experiment) -> shards.Options:
    task, config = build_task(experiment), experiment.data
    return shards.Options(
        sample_rate=config.sample_rate,
        channels=config.channels,
        kind=task.kind,
        shifts=task.shifts,
        round_trips=task.round_trips,
        stems=task.stems,
        songs=config.builtin_songs,
        seconds=config.builtin_seconds,
        validation=0.125,
    )


BUILTIN_KEYS = (
    "sample_rate",
    "channels",
    "kind",
    "shifts",
    "round_trips",
    "stems",
    "songs",
    "seconds",
    "seed",
    "validation",
)
"""The shard options that built-in music depends on."""


def _builtin_hash(options: shards.Options) -> str:
    return digest({"band": BAND_VERSION, **{key: getattr(options, key) for key in BUILTIN_KEYS}})


def data_hash(experiment: Experiment) -> str:
    """Stands for the data in the id: the manifest's hash; of built-in music its recipe, so nothing
    need be rendered. ConfigError where prepared shards do not fit the experiment."""
    if experiment.data.path == "builtin":
        return _builtin_hash(_builtin_options(experiment))
    manifest = shards.read_manifest(experiment.data.path)
    problems = list(_data_problems(experiment, build_task(experiment), manifest))
    if problems:
        raise ConfigError(experiment.data.path, problems)
    return manifest.hash


def identity(experiment: Experiment) -> str:
    """The experiment's id; ConfigError where its shards are missing."""
    return experiment.identity(data_hash(experiment))


def run_url(experiment: Experiment) -> str:
    """The run's folder: <results>/<name>/<id>."""
    return storage.join(experiment.runtime.results, experiment.name, identity(experiment))


def _data_problems(experiment: Experiment, task: Any, manifest: shards.Manifest):
    config = experiment.data
    if manifest.sample_rate != config.sample_rate:
        yield (
            "data.sample_rate",
            (
                f"the shards have {manifest.sample_rate} Hz, the experiment asks for "
                f"{config.sample_rate}; set "
                f"data.sample_rate={manifest.sample_rate}, or write shards with --sample-rate "
                f"{config.sample_rate}"
            ),
        )
    if manifest.channels != config.channels:
        yield (
            "data.channels",
            f"the shards have {manifest.channels}, the experiment asks for {config.channels}",
        )
    for voice in task.voices:
        if voice not in manifest.voices:
            yield (
                "task",
                (
                    f"the shards have no column '{voice}' (there is "
                    f"{', '.join(manifest.voices)}); write them with "
                    f"{' '.join(f'--shift {s:g}' for s in task.shifts) or '--stems'}"
                    + ("" if not task.shifts else ", or set task.shift=on_the_fly")
                ),
            )
    for split in ("train", "validation"):
        if not manifest.rows(split):
            yield (
                "data.path",
                f"no {split} chunks in the manifest; write the shards with another "
                "--validation share",
            )


def build_recipe(experiment: Experiment, prepared: Prepared) -> data.Recipe:
    return data.training_recipe(
        prepared.manifest,
        prepared.url,
        build_task(experiment),
        augment=build_augment(experiment),
        segment=experiment.data.segment,
        batch_size=experiment.train.batch_size,
        seed=experiment.train.seed,
        groups_per_unit=experiment.data.row_groups_per_unit,
        batches_per_unit=experiment.data.batches_per_unit,
    )


def build_validation(experiment: Experiment, prepared: Prepared) -> data.Validation:
    return data.validation_set(
        prepared.manifest,
        prepared.url,
        build_task(experiment),
        validation_segment(experiment),
        experiment.validation.items,
    )


def describe(experiment: Experiment) -> dict[str, Any]:
    """What would run, without running it: one JSON object for `--describe`."""
    model = meta_model(experiment)
    config, segment = experiment.data, experiment.data.segment
    batch = experiment.train.batch_size
    sources = len(build_task(experiment).sources)
    field: Any = getattr(model, "receptive_field", None)  # samples, where it means something
    return {
        "name": experiment.name,
        "id": identity(experiment),
        "parameters": num_parameters(model),
        "receptive_field_samples": field,
        "receptive_field_ms": round(1000 * field / config.sample_rate, 1) if field else None,
        "length_multiple": getattr(model, "length_multiple", 1),
        "input_shape": [batch, config.channels, segment],
        "target_shape": [batch, sources, config.channels, segment],
        "validation_shape": [1, config.channels, validation_segment(experiment)],
        "bytes_per_batch": 2 * batch * config.channels * segment * (1 + sources),
        "seconds_of_audio_per_step": round(batch * segment / config.sample_rate, 3),
        "hours_of_audio": round(
            batch * segment / config.sample_rate * experiment.train.steps / 3600, 2
        ),
        "experiment": experiment.resolved(),
    }
