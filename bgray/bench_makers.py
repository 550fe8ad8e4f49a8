"""Ways to make the batches of a stream, as candidates that work in turn; each takes them into
memory of its own, as a training step does."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bgray.bench_turns import Link
from bgray.data import Batch, Recipe, make_unit

KEPT_UNITS = 8
"""In the feed cache; read again and again."""
FOREVER = 2**30


class Consumer:
    """Copies batches into its own two arrays, pinned where there is a GPU."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def __call__(self, inputs: Any, targets: Any) -> None:
        if not self._kept:
            pinned = torch.cuda.is_available()
            self._kept = [
                torch.empty(np.shape(a), dtype=torch.int16, pin_memory=pinned)
                for a in (inputs, targets)
            ]
        for mine, theirs in zip(self._kept, (inputs, targets), strict=True):
            mine.numpy()[...] = theirs


def _work(link: Link, consume: Callable[[int, int], Any]) -> None:
    """Turns: consume(first, units); the answer has the CPU time of this process alone."""
    link.answer(None)
    while (order := link.next()) is not None:
        before = time.process_time()
        more = consume(*order) or {}
        own = time.process_time() - before
        link.answer({"units": order[1], "own_cpu_seconds": own, **more})


def computing(link: Link, recipe: Recipe) -> None:
    copy = Consumer()

    def consume(first: int, units: int) -> None:
        for unit in range(first, first + units):
            for x, y in zip(*make_unit(recipe, unit), strict=True):
                copy(x, y)

    _work(link, consume)


def copying(link: Link, recipe: Recipe) -> None:
    copy, (inputs, targets) = Consumer(), make_unit(recipe, 0)

    def consume(first: int, units: int) -> None:
        for _ in range(units):
            for x, y in zip(inputs, targets, strict=True):
                copy(x, y)

    _work(link, consume)


class Units(IterableDataset):
    """The stream's work units from unit 0 on, each as two int16 tensors (n, B, C, T) and (n, B, S,
    C, T); worker w of W makes units w, w + W, ..., which a DataLoader puts in order."""

    def __init__(self, recipe: Recipe, stop: int = FOREVER):
        super().__init__()
        self.recipe, self.stop = recipe, stop

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        for unit in range(start, self.stop, step):
            inputs, targets = make_unit(self.recipe, unit)
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


def loader(recipe: Recipe, workers: int | None = None, stop: int = FOREVER) -> DataLoader:
    """The DataLoader that a person who knows it would write: whole batches made by the workers
    (one torch thread each, as DataLoader sets it), several ahead, pinned where there is a GPU."""
    return DataLoader(
        Units(recipe, stop),
        batch_size=None,
        num_workers=workers or os.cpu_count() or 1,
        prefetch_factor=2,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


def loading(link: Link, recipe: Recipe) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers' libraries
    copy, units = Consumer(), iter(loader(recipe))

    def consume(first: int, number: int) -> None:
        for _ in range(number):
            for x, y in zip(*next(units), strict=True):
                copy(x.numpy(), y.numpy())

    _work(link, consume)


def _take(batches: Iterator[Batch], number: int, copy: Consumer) -> None:
    for _ in range(number):
        batch = next(batches)
        copy(batch.inputs, batch.targets)


def in_process(link: Link, recipe: Recipe) -> None:
    from bgray import feed
    from bgray.prefetch import Prefetched

    copy = Consumer()
    made = feed.in_process(recipe, 0, FOREVER * recipe.batches_per_unit)
    with Prefetched(made) as ahead:
        batches = iter(ahead)
        _work(link, lambda _, units: _take(batches, units * recipe.batches_per_unit, copy))


def cached(link: Link, recipe: Recipe, folder: str) -> None:
    """Reads what a run before it, in another process, would have left."""
    from bgray import feed
    from bgray.config import FeedCache
    from bgray.feed_cache import UnitCache

    copy, settings = Consumer(), FeedCache(folder, 64.0)
    stop = KEPT_UNITS * recipe.batches_per_unit

    def once() -> int:
        cache = UnitCache(settings, recipe)
        for batch in feed.in_process(recipe, 0, stop, cache=cache):
            copy(batch.inputs, batch.targets)
        return cache.hits

    def consume(_: int, units: int) -> dict[str, int]:
        passes = max(1, units // KEPT_UNITS)
        hits = [once() for _ in range(passes)]
        return {"units": passes * KEPT_UNITS, "hits": min(hits)}

    once()
    _work(link, consume)


def on_ray(link: Link, recipe: Recipe, workers: int | None, cpus: float) -> None:
    from bgray import feed
    from bgray.session import ray_session

    copy, each = Consumer(), recipe.batches_per_unit

    def consume(first: int, units: int) -> None:
        place = (first * each, (first + units) * each)
        made = feed.on_ray(recipe, *place, workers=workers, cpus=cpus)
        _take(made, units * each, copy)
        assert next(made, None) is None

    with ray_session():
        _work(link, consume)
