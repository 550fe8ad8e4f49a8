"""What the sections of an experiment demand of each other, checked before anything starts."""

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bgray import storage
from bgray.build import (
    build_loss,
    build_schedule,
    build_task,
    meta_model,
    validation_segment,
)
from bgray.config import Experiment
from bgray.losses import LossSum, needed
from bgray.models.unet import recompute
from bgray.problems import Problem, first_line


def conflicts(experiment: Experiment) -> Iterator[Problem]:
    """Every problem between sections, as (path, value and the way out)."""
    try:
        model = meta_model(experiment)
    except ValueError as error:  # what depends on the number of sources or channels
        yield "model", str(error)
        return
    train, runtime = experiment.train, experiment.runtime
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
    if runtime.recompute and not recompute(model):
        yield (
            "runtime.recompute",
            f"{experiment.model.name} has no blocks to recompute; leave it out",
        )
    if runtime.cuda_graphs is True and runtime.workers > 1:
        yield (
            "runtime.cuda_graphs",
            "true is for one worker; use auto, or workers: 1",
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
    if runtime.vram != "whole":
        if runtime.vram != "auto" and not 0 < runtime.vram < math.inf:
            yield "runtime.vram", f"must be above 0 GiB, whole or auto, got {runtime.vram:g}"
        if runtime.workers > 1:
            yield "runtime.vram", "must be whole with runtime.workers > 1: ranks cannot share a GPU"
        if runtime.gpus != 1:
            text = f"shares GPUs by GiB: leave runtime.gpus = {runtime.gpus:g} out"
            yield "runtime.vram", text
    for path in ("results", "cache"):
        url = getattr(runtime, path)
        if storage.is_remote(url) and not url.startswith("s3://"):
            yield f"runtime.{path}", f"must be a folder or start with s3://, got {url!r}"
    schedule = build_schedule(experiment)
    try:
        schedule.scale(0, train.steps)
    except ValueError as error:
        yield "schedule", str(error)
    task = build_task(experiment)
    metric = getattr(schedule, "metric", None)
    if metric and metric not in task.scores:
        yield (
            "schedule.metric",
            f"'{metric}' is not scored by this task; there is {', '.join(task.scores)}",
        )
    if task.kind == "roll" and experiment.data.augment:
        yield "data.augment", "is for audio: a piano roll has no gain and no polarity; leave it out"
    given = getattr(model, "num_sources", 1)
    if given != len(task.sources):
        misfit = True
        yield (
            "model",
            f"{experiment.model.name} gives {given} source, the task wants {len(task.sources)} "
            f"({', '.join(task.sources)}); use a model that separates, or task.targets with one",
        )
    head = getattr(model, "head", None)
    if head in ("softmax", "complementary") and not task.additive:
        yield (
            "model.head",
            f"{head} makes the sources add up to the input, but these targets do not; use none or "
            "tanh, or ask for all instruments",
        )
    losses, problems = _rehearsed(experiment)
    yield from problems
    yield from _meanings(experiment, task, model, losses)
    if not misfit:
        yield from _try_losses(experiment, model, losses)
        yield from _try_scores(experiment, task)


def _meanings(
    experiment: Experiment, task: Any, model: nn.Module, sums: dict[str, LossSum]
) -> Iterator[Problem]:
    """What the losses take the model's output for, against what it can be."""
    losses: dict[str, Any] = {name: sums[name].losses[name] for name in sums}
    meaning = getattr(task, "estimate", "audio")
    taken = {
        name: getattr(loss, "estimates", "any" if needed(loss) else "level")
        for name, loss in losses.items()
    }
    for name, loss in losses.items():
        lacking = [extra for extra in needed(loss) if extra not in getattr(model, "extras", ())]
        if lacking:
            yield (
                f"loss.{name}",
                f"needs {' and '.join(lacking)} from the model, which {experiment.model.name} "
                "with these options does not give",
            )
        if taken[name] == "logits" and meaning == "audio":
            yield f"loss.{name}", "is for piano rolls; audio is no probability"
        if taken[name] == "level" and meaning == "logits":
            yield (
                f"loss.{name}",
                "compares levels, but task.estimate is logits; set task.estimate=level, "
                "or use bce_logits",
            )
        low, high = getattr(model, "output_range", (-math.inf, math.inf))
        if taken[name] == "logits" and not getattr(loss, "bounded_ok", True):
            if math.isfinite(low) or math.isfinite(high):
                yield f"loss.{name}", _bounded(experiment, name, low, high)
    used = {extra for loss in losses.values() for extra in needed(loss)}
    if "log_variance" in getattr(model, "extras", ()) and "log_variance" not in used:
        yield "loss", "needs kl beside it with model.variational: true, e.g. kl: 1"
    if meaning == "level" and losses and "level" not in taken.values():
        yield (
            "task.estimate",
            f"is level, but {', '.join(losses)} trains logits; set task.estimate=logits",
        )


def _rehearsed(experiment: Experiment) -> tuple[dict[str, LossSum], list[Problem]]:
    """Every loss by itself, and why some cannot be built."""
    losses, problems = {}, []
    for name, pick in experiment.loss.items():
        alone = dataclasses.replace(experiment, loss={name: pick})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the random weights
                losses[name] = build_loss(alone, rehearsal=True)
        except ValueError as error:
            problems.append((f"loss.{name}", str(error)))
    return losses, problems


def _bounded(experiment: Experiment, loss: str, low: float, high: float) -> str:
    floors = [math.log1p(math.exp(low)), math.log1p(math.exp(-high))]  # of a 0, of a 1
    floor = " and ".join(
        f"{floor:.4f} for {cell}"
        for floor, cell in zip(floors, ("silence", "a note"), strict=True)
        if floor > 0
    )
    return (
        f"needs an output that reaches all real numbers, but that of {experiment.model.name} lies "
        f"in ({low:g}, {high:g}): it cannot fall below {floor}. Use model.head=linear, or "
        f"loss.{loss}.bounded_ok=true to see that for yourself"
    )


def _try_losses(
    experiment: Experiment, model: nn.Module, losses: dict[str, LossSum]
) -> Iterator[Problem]:
    """Silence through every loss: transforms longer than the segment show here, not at step 0."""
    silence, extras = _silence(experiment, model)
    for name, alone in losses.items():
        if any(extra not in extras for loss in alone.losses.values() for extra in needed(loss)):
            continue  # said already
        try:
            with torch.no_grad():
                alone(silence, silence, extras)
        except (RuntimeError, ValueError) as error:
            text = f"fails on examples of shape (S, C, T) = {tuple(silence.shape[1:])}: {error}"
            yield f"loss.{name}", text.splitlines()[0]


def _try_scores(experiment: Experiment, task: Any) -> list[Problem]:
    """Kept, for it takes half a second and is the same for most variants of a sweep."""
    rate, channels = experiment.data.sample_rate, experiment.data.channels
    shape = (1, len(task.sources), channels, validation_segment(experiment))
    key = (json.dumps(dataclasses.asdict(experiment.task), sort_keys=True), rate, shape)
    if key not in _tried_scores:
        _tried_scores[key] = list(_scoring_problems(task, rate, shape))
    return _tried_scores[key]


_tried_scores: dict[Any, list[Problem]] = {}


def _scoring_problems(task: Any, rate: int, shape: tuple[int, ...]) -> Iterator[Problem]:
    try:
        score = task.scorer(rate)
    except ValueError as error:
        yield "data.sample_rate", f"{rate} Hz: the task's scores cannot be computed: {error}"
        return
    noise = torch.rand(shape)
    try:
        score(noise, noise)
    except (RuntimeError, ValueError) as error:
        text = f"{shape[-1]} samples cannot be scored: {first_line(error)}"
        yield "validation.segment", text


def _silence(experiment: Experiment, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """An estimate and extras for one example, all zeros."""
    data, sources = experiment.data, len(build_task(experiment).sources)
    silence = torch.zeros(1, sources, data.channels, data.segment)
    if not getattr(model, "extras", ()):
        return silence, {}
    # Their shapes are the model's own affair: it says them without memory for its weights.
    with torch.no_grad():
        output: Any = model.eval()(torch.zeros(1, data.channels, data.segment, device="meta"))
    return silence, {name: torch.zeros(value.shape) for name, value in output[1].items()}
