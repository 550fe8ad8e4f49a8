"""What each kind of trial costs on this machine: measured with made-up data, or scaled from one
that was."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from bgray import probes
from bgray.build import meta_model, num_parameters
from bgray.config import Experiment
from bgray.context import Context
from bgray.probes import GIB
from bgray.rehearsal import Cost, cost_key, rehearse

PROBES = 8
"""Kinds of trial that are measured at most; the others are scaled from these."""
SECONDS = 20.0
"""That all probes together may take, about: each kind takes at least a few steps."""
KEPT = 2
"""Checkpoints that a run keeps: latest and best."""
LOG_BYTES = 2 * 2**20
"""Of a run's text files, at most."""


@dataclass(frozen=True)
class Range:
    """A figure with the bounds that were seen."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> "Range":
        return Range(self.low * factor, self.middle * factor, self.high * factor)

    def plus(self, seconds: float) -> "Range":
        return Range(self.low + seconds, self.middle + seconds, self.high + seconds)

    @staticmethod
    def total(parts: "Iterable[Range]") -> "Range":
        """Sum; what errs in one part errs in all."""
        found = [(part.low, part.middle, part.high) for part in parts]
        return Range(*(sum(values) for values in zip(*found, strict=True))) if found else NOTHING

    def text(self, show: Callable[[float], str]) -> str:
        low, middle, high = show(self.low), show(self.middle), show(self.high)
        return f"about {middle}" + (f" ({low} to {high})" if low != high else "")


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Kind:
    """What trials of one cost take."""

    label: str
    step_seconds: Range
    """Of a full batch."""
    cost: Cost
    sure: str
    """How it was found."""
    whole: bool
    """Measured, and with all examples of a batch: its memory is the trial's, too."""

    def seconds(self, experiment: Experiment, steps: float) -> Range:
        """Of one run of so many steps: start, steps, validations and checkpoints."""
        if steps <= 0:
            return NOTHING
        items, cost = num_items(experiment), self.cost
        every = experiment.validation.every
        saves = math.ceil(steps / (experiment.runtime.checkpoint_every or every))
        aside = cost.start_seconds + items * cost.score_seconds + saves * cost.save_seconds
        aside += math.ceil(steps / every) * items * cost.item_seconds
        return self.step_seconds.times(steps).plus(aside)

    def bytes(self, experiment: Experiment, steps: float) -> float:
        """That one run leaves: checkpoints, clips and text files."""
        if steps <= 0:
            return 0.0
        evaluations = math.ceil(steps / experiment.validation.every)
        clips = min(experiment.validation.clips, num_items(experiment))
        lines = steps / experiment.runtime.log_every
        text = 30 * self.cost.parts * lines
        text += 10 * self.cost.scores * num_items(experiment) * evaluations
        # Of each listening item the input and the target once, the estimate at each evaluation.
        sound = clips * self.cost.clip_bytes * (evaluations + 2)
        return KEPT * self.cost.checkpoint_bytes + sound + min(LOG_BYTES, text)


def num_items(experiment: Experiment) -> int:
    """Validation items at most; of built-in music, whose songs are known before it is rendered, no
    more than it will have."""
    config, items = experiment.data, experiment.validation.items
    if config.path != "builtin":
        return items
    songs = max(1, round(0.125 * config.builtin_songs))
    return min(items, songs * math.ceil(config.builtin_seconds / 10))


def measure(
    experiments: Sequence[tuple[str, Experiment]],
    *,
    threads: int,
    device: torch.device,
    seconds: float = SECONDS,
    most: int = PROBES,
) -> dict[str, Kind]:
    """`cost_key` to what trials of that cost take; each distinct one is measured while there is
    time, the first ones first; on a CPU one example of the first one comes on top. Nothing is read,
    written or started."""
    kinds = {cost_key(e): (label, e) for label, e in reversed(experiments)}
    kinds = {cost_key(e): kinds[cost_key(e)] for _, e in experiments}
    found: dict[str, Kind] = {}
    todo = list(kinds.items())[:most]
    deadline = math.inf
    for number, (key, (label, experiment)) in enumerate(todo):
        each = (deadline - time.perf_counter()) / (len(todo) - number)
        if number and each <= 0:
            break
        context = Context(device=device, threads=threads)
        if number == 0:
            # What a process does once, such as imports, is not to take the time of the steps.
            found[key] = _measured(label, experiment, context, seconds / len(todo), first=True)
            deadline = time.perf_counter() + seconds * (1 - 1 / len(todo))
        else:
            found[key] = _measured(label, experiment, context, each)
    for key, (label, experiment) in kinds.items():
        if key not in found:
            found[key] = _scaled(label, experiment, [(kinds[k][1], found[k]) for k in found])
    return found


def _measured(
    label: str, experiment: Experiment, context: Context, seconds: float, first: bool = False
) -> Kind:
    full = experiment.train.batch_size // experiment.runtime.workers
    if context.device.type == "cuda":
        cost = rehearse(experiment, context, steps=200, each=10, seconds=seconds)
    else:
        before = probes.memory(context.device)["rss_peak_gib"] or 0.0
        began = time.perf_counter()
        cost = rehearse(experiment, context, batch=1, warm_up=1, steps=1)
        left = max(0.0, seconds - (0.0 if first else time.perf_counter() - began))
        grown = max(1e-3, cost.rss_gib - before)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        # A warm-up step and two timed ones have to fit; and half of the memory must stay free.
        batch = min(full, int(left / 3 / cost.step_seconds[-1]), int(free / 2 / grown))
        if batch > 0:
            more = rehearse(
                experiment,
                context,
                batch=batch,
                warm_up=1,
                steps=30,
                seconds=0.6 * left,
                whole=False,
            )
            cost = dataclasses.replace(
                cost, batch=batch, step_seconds=more.step_seconds, rss_gib=more.rss_gib
            )
    timed, scale = sorted(cost.step_seconds), full / cost.batch
    # Few steps do not show the spread, and an example is cheaper in a batch than alone.
    more = 1.0 if len(timed) >= 5 else 1.25
    less = 1.0 if cost.batch == full else 1.5 if cost.batch > 1 else 3.0
    low, high = timed[len(timed) // 10] / more / less, timed[-1 - len(timed) // 10] * more
    sure = f"{_count(len(timed), 'step')} of {_count(cost.batch, 'example')}"
    if cost.batch < full:
        sure += f" instead of {full}"
    middle = statistics.median(timed)
    return Kind(label, Range(low, middle, high).times(scale), cost, sure, cost.batch == full)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def _scaled(label: str, experiment: Experiment, known: list[tuple[Experiment, Kind]]) -> Kind:
    """By parameters x samples from the nearest one that was measured; a factor of two either way is
    a guess, too."""

    def work(e: Experiment) -> float:
        size = num_parameters(meta_model(e)) * e.data.segment * e.train.batch_size
        return max(1.0, size / e.runtime.workers)

    own = work(experiment)
    other, kind = min(known, key=lambda pair: abs(math.log(work(pair[0]) / own)))
    ratio, was = own / work(other), kind.step_seconds
    step = Range(was.low / 2, was.middle, 2 * was.high).times(ratio)
    parameters = num_parameters(meta_model(experiment)) / num_parameters(meta_model(other))
    cost = dataclasses.replace(
        kind.cost,
        item_seconds=kind.cost.item_seconds * ratio,
        checkpoint_bytes=round(kind.cost.checkpoint_bytes * parameters),
    )
    return Kind(label, step, cost, f"scaled from {kind.label}", False)
