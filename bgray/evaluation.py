"""Validation of one run: every frozen item scored, and a few of them written as audio."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from bgray import storage
from bgray.build import build_task, validation_segment
from bgray.config import Experiment, digest
from bgray.context import Context
from bgray.data import Validation, public
from bgray.experiment import Prepared, build_validation
from bgray.lines import shortened
from bgray.transfer import to_device
from bgray.warm import kept

Scores = dict[str, list[float | None]]
"""Metric to one value per item, in the order of the frozen list; None where it has no meaning."""


def means(scores: Scores) -> dict[str, float]:
    """Over the items where the metric has a meaning; NaN where one of them is not finite."""
    known = {name: [v for v in values if v is not None] for name, values in scores.items()}
    return {name: _mean(values) for name, values in known.items() if values}


def _mean(values: list[float]) -> float:
    return shortened(float(np.mean(values))) if np.isfinite(values).all() else math.nan


def without_nan(scores: Scores) -> Scores:
    """The same for JSON: None also where a score is not finite."""
    return {
        name: [v if v is not None and math.isfinite(v) else None for v in values]
        for name, values in scores.items()
    }


def items_at_once(experiment: Experiment, device: torch.device) -> int:
    """How many validation items are estimated together: as many as a training batch has samples.
    One alone leaves a GPU waiting for its kernels' launches; on a CPU one is the faster."""
    if device.type != "cuda":
        return 1
    samples = experiment.train.batch_size // experiment.runtime.workers * experiment.data.segment
    return max(1, samples // validation_segment(experiment))


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
        self.validation, self.items = self._read(experiment, prepared)
        self.num_items = len(self.validation.items)
        self.at_once = items_at_once(experiment, context.device)
        clips = min(experiment.validation.clips, self.num_items)
        self.listening = {i * self.num_items // clips for i in range(clips)}
        self.listing = {"data": prepared.manifest.hash, **self.validation.listing}
        self.hash = digest(self.listing)[:12]
        """Two trials with the same one can be compared."""
        self.heard = np.empty((0, 0, 0))
        """Of the last `scores`, for `guards`: (N, 2S+1, 2S+1) mean products of an item's estimates,
        targets and input."""

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
        # What decides the last digits, too: they are the same for every trial of a process.
        numerics = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        place = (str(self.context.device), self.context.threads, *numerics)
        if self.context.world > 1:  # all ranks score, or none
            return self.scores(self.task.baseline)
        key = ("baseline", self.hash, self.sample_rate, *place)
        return kept(key, lambda: self.scores(self.task.baseline), lambda scores: 100_000)

    def _read(
        self, experiment: Experiment, prepared: Prepared
    ) -> tuple[Validation, list[tuple[int, np.ndarray, np.ndarray]]]:
        """The items of this rank, (number, inputs, targets) each, read once in a process."""
        context, wanted = self.context, experiment.validation

        def read() -> Any:
            validation = build_validation(experiment, prepared)
            return validation, validation.load(context.rank, context.world)

        task = (type(self.task).__name__, repr(public(self.task)))
        shape = (validation_segment(experiment), wanted.items, context.rank, context.world)
        key = ("validation", prepared.url, prepared.manifest.hash, *task, *shape)
        return kept(key, read, lambda found: sum(x.nbytes + y.nbytes for _, x, y in found[1]))

    def scores(self, estimate: Callable[[Tensor], Tensor], clip: str | None = None) -> Scores:
        """Of estimate: (B, C, T) -> (B, S, C, T), over the items of all ranks; `clip` names the
        audio that is written of the listening set."""
        scored: dict[int, tuple[dict[str, Tensor], Tensor]] = {}
        audible: dict[int, Tensor] = {}
        with torch.no_grad():
            for first in range(0, len(self.items), self.at_once):
                items = self.items[first : first + self.at_once]
                full_scale = self.task.full_scale
                x, y = (
                    to_device(np.stack(parts), self.context.device, full_scale)
                    for parts in list(zip(*items, strict=True))[1:]
                )  # (B, C, T), (B, S, C, T)
                output = estimate(x)
                # Each is scored by itself, whoever is beside it.
                for i, (number, _, _) in enumerate(items):
                    one = slice(i, i + 1)
                    products = self._products(output[one], y[one], x[one])
                    scored[number] = self.score(output[one], y[one]), products
                    if clip and number in self.listening:
                        audible[number] = output[i].float()
        found = _on_host(scored)
        for number, output in audible.items():
            self._clip(f"{number:03d}-{clip}", output.cpu().numpy())
        if self.context.world > 1:
            gathered: list[Any] = [None] * self.context.world
            torch.distributed.all_gather_object(gathered, found)
            found = {number: scores for part in gathered for number, scores in part.items()}
        order = sorted(found)
        self.heard = np.array([found[n][1] for n in order])
        return {name: [_round(found[n][0].get(name)) for n in order] for name in self.task.scores}

    def _products(self, output: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """(1, S, C, T) estimate and target, (1, C, T) input -> (2S+1, 2S+1)."""
        level = getattr(self.task, "level", None)  # of rolls an estimate may be logits
        estimate = output.float() if level is None else level(output)
        signals = torch.cat([estimate[0].flatten(1), y[0].flatten(1), x.flatten(1)])  # (2S+1, C*T)
        return signals @ signals.T / signals.shape[-1]

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


def _on_host(
    scored: dict[int, tuple[dict[str, Tensor], Tensor]],
) -> dict[int, tuple[dict[str, float], list[list[float]]]]:
    """The same as numbers, in one copy: to ask for each would wait for the GPU as often."""
    values = [v.double() for scores, _ in scored.values() for v in scores.values()]
    values += [products.double().flatten() for _, products in scored.values()]
    flat: list[float] = torch.cat([v.reshape(-1) for v in values]).tolist() if values else []
    numbers = iter(flat)
    scores = {n: {name: next(numbers) for name in found} for n, (found, _) in scored.items()}
    return {
        n: (scores[n], [[next(numbers) for _ in row] for row in products])
        for n, (_, products) in scored.items()
    }


def _round(value: float | None) -> float | None:
    return None if value is None else shortened(value)
