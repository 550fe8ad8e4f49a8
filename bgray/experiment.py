"""From YAML to built objects: the tables of names, the checks across sections, model, loss,
optimizer and data."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bgray import data, shards, storage
from bgray.augment import AUGMENTS
from bgray.band import VERSION as BAND_VERSION
from bgray.config import ConfigError, Experiment, digest, parse
from bgray.document import override, read
from bgray.losses import LOSSES, LossSum
from bgray.models import MODELS
from bgray.optim import OPTIMIZERS, SCHEDULES
from bgray.tasks import TASKS

TABLES = {
    "task": TASKS,
    "model": MODELS,
    "loss": LOSSES,
    "optim": OPTIMIZERS,
    "schedule": SCHEDULES,
    "augment": AUGMENTS,
}


def load(source: str, overrides: tuple[str, ...] = ()) -> Experiment:
    """The experiment in a YAML file (a sweep's base, when it has a search), fully checked."""
    return resolve(read_overridden(source, overrides), source)


def read_overridden(source: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file with --set applied. A part of the task's default loss that is changed, by --set or
    by the search, is changed within it: `loss.l1=5` keeps the other parts."""
    raw = read(source)
    paths = [item.partition("=")[0] for item in overrides]
    blocks = [raw.get("search"), *(raw.get("variants") or {}).values()]
    paths += [path for block in blocks if isinstance(block, dict) for path in block]
    if "loss" not in raw and any(str(path).startswith("loss.") for path in paths):
        task = raw.get("task")
        name = task.get("name") if isinstance(task, dict) else task
        raw["loss"] = dict(getattr(TASKS.get(str(name)), "default_loss", {}))
    override(raw, overrides, source)
    return raw


def resolve(raw: dict[str, Any], source: str) -> Experiment:
    """Parse and check across sections; ConfigError with every problem found."""
    experiment = parse(raw, TABLES, source)
    problems = list(_conflicts(experiment))
    if problems:
        raise ConfigError(source, problems)
    return experiment


def _conflicts(experiment: Experiment):
    model, train, runtime = meta_model(experiment), experiment.train, experiment.runtime
    multiple, misfit = getattr(model, "length_multiple", 1), False
    lengths = {
        "data.segment": experiment.data.segment,
        "validation.segment": validation_segment(experiment),
    }
    for path, length in lengths.items():
        if length % multiple:
            misfit = True
            near = max(multiple, length // multiple * multiple)
            yield (
                path,
                (
                    f"{length} samples is not a multiple of {multiple}, which the model's "
                    "strides need; "
                    f"use {near} or {near + multiple}"
                ),
            )
    if train.batch_size % runtime.workers:
        yield (
            "train.batch_size",
            f"{train.batch_size} is not divisible by runtime.workers = {runtime.workers}",
        )
    if runtime.workers > 1 and 0 < runtime.gpus < 1:
        yield (
            "runtime.gpus",
            "must be 1 or more with runtime.workers > 1: DDP ranks cannot share a GPU",
        )
    if runtime.gpus > 1 and runtime.gpus % 1:
        yield "runtime.gpus", f"must be a whole number above 1, got {runtime.gpus:g}"
    for path in ("results", "cache"):
        url = getattr(runtime, path)
        if storage.is_remote(url) and not url.startswith("s3://"):
            yield f"runtime.{path}", f"must be a folder or start with s3://, got {url!r}"
    try:
        build_schedule(experiment)(0, train.steps)
    except ValueError as error:
        yield "schedule", str(error)
    if not misfit:
        yield from _try_losses(experiment)


def _try_losses(experiment: Experiment):
    """One example of silence through every loss: transforms longer than the segment show here, not
    at step 0."""
    silence = torch.zeros(
        1, len(build_task(experiment).sources), experiment.data.channels, experiment.data.segment
    )
    for name, pick in experiment.loss.items():
        alone = dataclasses.replace(experiment, loss={name: pick})
        try:
            build_loss(alone)(silence, silence)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            yield (
                f"loss.{name}",
                f"cannot take segments of data.segment = {experiment.data.segment} samples: "
                f"{reason}",
            )


def validation_segment(experiment: Experiment) -> int:
    """Samples of a validation crop; by default four training segments."""
    return experiment.validation.segment or 4 * experiment.data.segment


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


# --- building


def build_task(experiment: Experiment) -> Any:
    return TASKS[experiment.task.name](**_typed(experiment.task))


def build_model(experiment: Experiment) -> nn.Module:
    return MODELS[experiment.model.name](**_typed(experiment.model))


def meta_model(experiment: Experiment) -> nn.Module:
    """The model without memory for its weights: for counts and checks, in milliseconds."""
    with torch.device("meta"):
        return build_model(experiment)


def build_loss(experiment: Experiment) -> LossSum:
    weighted = {}
    for name, pick in experiment.loss.items():
        options = _without_weight(_typed(pick))
        if "sample_rate" in _arguments(LOSSES[name]):
            options["sample_rate"] = experiment.data.sample_rate
        weighted[name] = (LOSSES[name](**options), pick.options["weight"])
    return LossSum(weighted)


def build_optimizer(experiment: Experiment, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[experiment.optim.name](model, **_typed(experiment.optim))


def build_schedule(experiment: Experiment) -> Callable[[int, int], float]:
    return SCHEDULES[experiment.schedule.name](**_typed(experiment.schedule)).scale


def num_parameters(model: nn.Module) -> int:
    """Trainable ones, as the logs print them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _arguments(entry: Callable[..., Any]):
    return inspect.signature(entry).parameters


def _typed(pick: Any) -> dict[str, Any]:
    """Options as their annotated types: JSON made lists of the tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in pick.options.items()}


def _without_weight(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "weight"}


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
        shifts=task.shifts,
        stems=task.stems,
        songs=config.builtin_songs,
        seconds=config.builtin_seconds,
        validation=0.125,
    )


BUILTIN_KEYS = (
    "sample_rate",
    "channels",
    "shifts",
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
        augment=tuple(AUGMENTS[p.name](**_typed(p)) for p in experiment.data.augment),
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


def parameter_count(experiment: Experiment) -> str:
    """As the logs write it: 15.83M."""
    count = num_parameters(meta_model(experiment))
    return f"{count / 1e6:.2f}M" if count >= 10_000 else str(count)
