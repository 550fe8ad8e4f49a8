"""From a checked experiment to objects: the tables of names, and what each section builds."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bgray.augment import AUGMENTS
from bgray.config import Experiment
from bgray.losses import LOSSES, LossSum
from bgray.models import MODELS
from bgray.models.unet import recompute
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


def build_task(experiment: Experiment) -> Any:
    return TASKS[experiment.task.name](**_typed(experiment.task))


def build_model(experiment: Experiment) -> nn.Module:
    entry = MODELS[experiment.model.name]
    model = entry(**_typed(experiment.model), **_context(experiment, entry))
    recompute(model, experiment.runtime.recompute)
    return model


def meta_model(experiment: Experiment) -> nn.Module:
    """The model without memory for its weights: for counts and checks, in milliseconds."""
    with torch.device("meta"):
        return build_model(experiment)


def build_loss(experiment: Experiment, *, rehearsal: bool = False) -> LossSum:
    """rehearsal: frozen networks get random weights, for theirs may have to be downloaded."""
    weighted = {}
    for name, pick in experiment.loss.items():
        options = _typed(pick)
        weight = options.pop("weight")
        entry = LOSSES[name]
        if rehearsal and "weights" in options:
            options["weights"] = "random"
        weighted[name] = (entry(**options, **_context(experiment, entry)), weight)
    return LossSum(weighted)


def build_optimizer(experiment: Experiment, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[experiment.optim.name](model, **_typed(experiment.optim))


def build_schedule(experiment: Experiment) -> Any:
    """An object with `scale(step, steps)`, and `metric` and `observe` where it follows a score."""
    return SCHEDULES[experiment.schedule.name](**_typed(experiment.schedule))


def build_augment(experiment: Experiment) -> tuple[Any, ...]:
    return tuple(AUGMENTS[pick.name](**_typed(pick)) for pick in experiment.data.augment)


def num_parameters(model: nn.Module) -> int:
    """Trainable ones, as the logs print them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _context(experiment: Experiment, entry: Callable[..., Any]) -> dict[str, Any]:
    """What the experiment says and a table's entry asks for by argument name."""
    known = {
        "sample_rate": experiment.data.sample_rate,
        "num_sources": len(build_task(experiment).sources),
        "channels_in": experiment.data.channels,
    }
    wanted = inspect.signature(entry).parameters
    return {name: value for name, value in known.items() if name in wanted}


def _typed(pick: Any) -> dict[str, Any]:
    """Options as their annotated types: JSON made lists of the tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in pick.options.items()}


def parameter_count(experiment: Experiment) -> str:
    """As the logs write it: 15.83M."""
    count = num_parameters(meta_model(experiment))
    return f"{count / 1e6:.2f}M" if count >= 10_000 else str(count)


def short_segment(experiment: Experiment) -> int:
    """Samples that the model takes, for a look at it: about 8192, or data.segment if less."""
    multiple = getattr(meta_model(experiment), "length_multiple", 1)
    return min(experiment.data.segment, -(-8192 // multiple) * multiple)


def validation_segment(experiment: Experiment) -> int:
    """Samples of a validation crop; by default four training segments, if a chunk of about 10 s
    holds them."""
    segment = experiment.data.segment
    fitting = int(10 * experiment.data.sample_rate / segment)
    return experiment.validation.segment or segment * min(4, max(1, fitting))
