"""Validation of one run: every frozen item scored, and a few of them written as audio."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from bgray import storage
from bgray.build import build_task
from bgray.config import Experiment, digest
from bgray.context import Context
from bgray.experiment import Prepared, build_validation
from bgray.loop import to_device

Scores = dict[str, list[float | None]]
"""Metric to one value per item, in the order of the frozen list; None where it has no meaning."""


def means(scores: Scores) -> dict[str, float]:
    """Over the items where the metric has a meaning."""
    known = {name: [v for v in values if v is not None] for name, values in scores.items()}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


class Evaluator:
    """Holds this rank's validation items in memory (int16) and scores estimates of them.

    url: the run's folder, for the clips; they are the same few items at every evaluation of every
    trial (the listening set).
    """

    def __init__(self, experiment: Experiment, prepared: Prepared, context: Context, url: str):
        self.context, self.url = context, url
        self.sample_rate = experiment.data.sample_rate
        self.task = build_task(experiment)
        self.score = self.task.scorer(self.sample_rate)
        self.validation = build_validation(experiment, prepared)
        self.items = self.validation.load(context.rank, context.world)
        self.num_items = len(self.validation.items)
        clips = min(experiment.validation.clips, self.num_items)
        self.listening = {i * self.num_items // clips for i in range(clips)}
        self.listing = {"data": prepared.manifest.hash, **self.validation.listing}
        self.hash = digest(self.listing)[:12]
        """Two trials with the same one can be compared."""

    def write_listing(self, folder: str) -> None:
        """validation-<hash>.json, for people: which crops of which chunks."""
        url = storage.join(folder, f"validation-{self.hash}.json")
        if not storage.exists(url):
            storage.write_bytes(url, json.dumps(self.listing, indent=1).encode() + b"\n")

    def baseline(self) -> Scores:
        """What doing nothing scores; writes the inputs and targets of the listening set."""
        for number, inputs, targets in self.items:
            if number in self.listening:
                self._clip(f"{number:03d}-input", inputs[None])
                self._clip(f"{number:03d}-target", targets)
        return self.scores(self.task.baseline)

    def scores(self, estimate: Callable[[Tensor], Tensor], clip: str | None = None) -> Scores:
        """Of estimate: (1, C, T) -> (1, S, C, T), over the items of all ranks; `clip` names the
        audio that is written of the listening set."""
        found: dict[int, dict[str, float]] = {}
        with torch.no_grad():
            for number, inputs, targets in self.items:
                full_scale = self.task.full_scale
                x = to_device(inputs[None], self.context.device, full_scale)  # (1, C, T)
                y = to_device(targets[None], self.context.device, full_scale)  # (1, S, C, T)
                output = estimate(x)
                found[number] = {
                    name: value.item() for name, value in self.score(output, y).items()
                }
                if clip and number in self.listening:
                    self._clip(f"{number:03d}-{clip}", output[0].float().cpu().numpy())
        if self.context.world > 1:
            gathered: list[Any] = [None] * self.context.world
            torch.distributed.all_gather_object(gathered, found)
            found = {number: scores for part in gathered for number, scores in part.items()}
        order = sorted(found)
        return {name: [_round(found[n].get(name)) for n in order] for name in self.task.scores}

    def _clip(self, name: str, sources: np.ndarray) -> None:
        """(S, C, T), int16 as read or float32, as one file (or more, of several kinds) per
        source."""
        for label, source in zip(self.task.sources, sources, strict=len(sources) > 1):
            if source.dtype == np.int16:
                source = source.astype(np.float32) / self.task.full_scale
            suffix = f"-{label}" if len(sources) > 1 else ""
            for extension, content in self.task.clips(source, self.sample_rate).items():
                # Not through the record, which only rank 0 has: each rank writes the clips of its
                # items.
                url = storage.join(self.url, "clips", f"{name}{suffix}{extension}")
                storage.write_bytes(url, content)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
