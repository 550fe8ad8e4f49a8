"""What of a sweep can be run, but is hardly what somebody meant."""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from bgray.build import build_model, build_schedule, meta_model, short_segment
from bgray.config import Experiment
from bgray.schedules import WarmupStableDecay
from bgray.search import Trial, rungs
from bgray.step import split_extras
from bgray.sweep_config import Sweep


def cautions(sweep: Sweep, trials: list[Trial]) -> Iterator[str]:
    """A sentence each; none for most sweeps."""
    if text := _decays_too_soon(sweep, trials):
        yield text
    if not sweep.pbt:
        yield from _same_networks(trials)


# --- rungs


def _decays_too_soon(sweep: Sweep, trials: list[Trial]) -> str:
    """Where a variant's rate falls before the last rung: what is judged there is how far the decay
    has come, not the variant. Empty otherwise."""
    judged = rungs(sweep, trials)
    found = [trial for trial in trials if judged and _decay_starts(trial) < judged[-1]]
    if not found:
        return ""
    return (
        f"the learning rate of {found[0].label} decays from step {_decay_starts(found[0])} on, "
        f"before the last rung at {judged[-1]}: rungs do not compare like with like; lower "
        "asha.grace_steps or schedule.decay_share"
    )


def _decay_starts(trial: Trial) -> float:
    schedule, steps = build_schedule(trial.experiment), trial.experiment.train.steps
    decays = isinstance(schedule, WarmupStableDecay) and schedule.final < 1
    return steps - round(schedule.decay_share * steps) if decays else math.inf


# --- variants that are one


def _same_networks(trials: list[Trial]) -> Iterator[str]:
    """Variants that differ in options of the model alone, and in none that it uses: kernels [7] and
    [7, 23, 41] where every level has one block."""
    alike: dict[str, dict[str, Trial]] = defaultdict(dict)
    for trial in trials:
        model = dataclasses.replace(trial.experiment.model, options={})
        rest = dataclasses.replace(trial.experiment, model=model)
        alike[rest.variant_identity(trial.data_hash)].setdefault(trial.variant, trial)
    for rivals in alike.values():
        built: dict[str, list[Trial]] = defaultdict(list)
        if len(rivals) > 1:
            for trial in rivals.values():
                built[_plan(trial.experiment)].append(trial)
        for candidates in built.values():
            yield from _one_network(candidates)


def _plan(experiment: Experiment) -> str:
    """Of equal networks the same; so it may be for others, that only compute otherwise."""
    model = meta_model(experiment)
    return f"{model} {[(name, tuple(x.shape)) for name, x in model.state_dict().items()]}"


def _one_network(candidates: list[Trial]) -> Iterator[str]:
    """Of those with the same layers, the ones whose weights and outputs are the same as well."""
    if len(candidates) == 1:
        return
    same: dict[str, list[Trial]] = defaultdict(list)
    for trial in candidates:
        same[_outcome(trial.experiment)].append(trial)
    for twins in same.values():
        if len(twins) > 1:
            yield (
                f"{' and '.join(trial.label for trial in twins)} are one and the same network: "
                f"{twins[0].experiment.model.name} does not use what differs between them, "
                "and their scores will be equal"
            )


def _outcome(experiment: Experiment) -> str:
    """A hash of the initial weights and of what they make of noise, as in training."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(experiment).train()
        found = hashlib.sha256()
        for weights in model.state_dict().values():
            found.update(weights.numpy().tobytes())
        noise = 0.1 * torch.randn(1, experiment.data.channels, short_segment(experiment))
        output: Any = model(noise)
        estimate, extras = split_extras(output)
        for values in (estimate, *extras.values()):
            found.update(values.numpy().tobytes())
    return found.hexdigest()
