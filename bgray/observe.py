"""Shows a fresh model what its inputs will be like, before its first step."""

from typing import Any

import torch

from bgray import feed
from bgray.build import build_task
from bgray.config import Experiment
from bgray.experiment import Prepared, build_recipe
from bgray.transfer import to_device

OBSERVED_EXAMPLES = 256
"""Training inputs from which a model takes its input statistics."""


def observe_inputs(
    experiment: Experiment, prepared: Prepared, model: Any, device: torch.device
) -> None:
    """Where a model has `observe`, give it the first training inputs, (B, C, T) each: the same on
    every rank."""
    if not hasattr(model, "observe"):
        return
    recipe, task = build_recipe(experiment, prepared), build_task(experiment)
    batches = feed.in_process(recipe, 0, -(-OBSERVED_EXAMPLES // experiment.train.batch_size))
    model.observe(to_device(batch.inputs, device, task.full_scale) for batch in batches)
