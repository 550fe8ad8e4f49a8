"""Feeds: the batches of a stream in their order, made in this process or by Ray Data, or taken from
the feed cache."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bgray import carried, data
from bgray.config import FeedCache
from bgray.data import Batch, Recipe
from bgray.feed_cache import UnitCache
from bgray.prefetch import Prefetched
from bgray.unit_file import Unit

LEAD_SECONDS = 20.0
"""Ray Data is started so long before the first unit that is not in the cache."""
LOT = 2048
"""Units of one execution of Ray Data. Before it delivers the first one it takes a millisecond of
CPU for each, so that a run of a million steps would wait for three minutes."""
AHEAD = 128
"""So many units before the end of a lot the next one is begun."""


def in_process(
    recipe: Recipe,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    *,
    cache: UnitCache | None = None,
) -> Iterator[Batch]:
    """Batches of steps [start, stop), made by the thread that asks, or from the cache."""
    last = recipe.unit_of(stop - 1)
    try:
        for number in range(recipe.unit_of(start), last + 1):
            if cache is None:
                unit = data.make_unit(recipe, number, rank, world)
            else:
                unit = _cached(cache, number, last)
            yield from _batches(recipe, number, unit, start, stop)
    finally:
        if cache is not None:
            cache.close()


@dataclass(frozen=True)
class Shelf:
    """What a Ray Data task has to know of its trial's cache."""

    settings: FeedCache
    key: str
    reader: str
    node: str
    """Where the trial is."""
    last: int
    """Unit that it will ask for."""


def on_ray(
    recipe: Recipe,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    *,
    workers: int | None = None,
    cpus: float = 1,
    resources: dict[str, float] | None = None,
    cache: UnitCache | None = None,
) -> Iterator[Batch]:
    """The same batches from Ray Data tasks, one execution; `workers` of them at a time (null: as
    many as there are CPUs), each asking for `cpus` and the `resources` of where it may run.

    cache: what it has from the first step on is read here, and Ray Data starts shortly before what
    it has not.
    """
    number, last = recipe.unit_of(start), recipe.unit_of(stop - 1)
    tasks = functools.partial(
        _from_tasks,
        recipe,
        rank=rank,
        world=world,
        options={"num_cpus": cpus, "resources": resources or None},
        workers=workers,
        cache=cache,
    )
    if cache is None:
        for made, (unit, _) in enumerate(tasks(number, last), number):
            assert unit is not None
            yield from _batches(recipe, made, unit, start, stop)
        return
    try:
        for i, unit in _cached_first(cache, tasks, number, last):
            yield from _batches(recipe, i, unit, start, stop)
    finally:
        cache.close()


def _cached_first(
    cache: UnitCache, tasks: Callable[[int, int], Iterator[Any]], number: int, last: int
) -> Iterator[tuple[int, Unit]]:
    """Units from the cache as long as it has them, then from tasks that have been started in
    time."""
    ready, pace, began = cache.run_from(number, last), math.inf, time.monotonic()

    def soon() -> bool:
        left = ready - number
        return ready <= last and (left <= 1 or left * pace < LEAD_SECONDS)

    while number <= last:
        if soon():
            ready = cache.run_from(ready, last)  # others may have gone on meanwhile
            if soon():
                break
        yield number, _cached(cache, number, last)
        number += 1
        pace, began = time.monotonic() - began, time.monotonic()
    if number > last:
        return
    # In a thread, so that there is no pause where the cache ends.
    with Prefetched(tasks(ready, last), ahead=1, stall_seconds=math.inf) as made:
        for i in range(number, ready):
            yield i, _cached(cache, i, last)
        for i, (unit, told) in enumerate(cast(Iterator[Any], iter(made)), ready):
            cache.tell(i)
            yield i, _taken(cache, i, unit, told)


def _cached(cache: UnitCache, number: int, last: int) -> Unit:
    cache.tell(number)
    return cache.unit(number, last)


def _taken(cache: UnitCache, number: int, unit: Unit | None, told: dict[str, Any]) -> Unit:
    """What a task has delivered, or left in the cache."""
    cache.add(told)
    if unit is None:
        unit = cache.look(number)
        return cache.make(number) if unit is None else unit
    if told.get("keep"):
        cache.keep(number, unit)
    return unit


def _batches(recipe: Recipe, number: int, unit: Unit, start: int, stop: int) -> Iterator[Batch]:
    for i in range(recipe.batches_per_unit):
        step = number * recipe.batches_per_unit + i
        if start <= step < stop:
            yield Batch(step, unit[0][i], unit[1][i])


# --- Ray Data


def _from_tasks(
    recipe: Recipe,
    first: int,
    last: int,
    *,
    rank: int,
    world: int,
    options: dict[str, Any],
    workers: int | None,
    cache: UnitCache | None,
) -> Iterator[tuple[Unit | None, dict[str, Any]]]:
    """Units in their order, and what their tasks have to say of the cache; None: it is there."""
    shelf = None
    if cache is not None and cache.key:
        import ray

        node = ray.get_runtime_context().get_node_id()
        shelf = Shelf(cache.settings, cache.key, cache.reader, node, last)
    given = {"recipe": recipe, "rank": rank, "world": world, "shelf": shelf}
    lot = functools.partial(_lot, given=given, options=options, workers=workers)
    with contextlib.ExitStack() as stack:
        # In threads, so that there is no pause between two.
        def begun(start: int) -> Prefetched:
            units: Any = lot(start, min(start + LOT - 1, last))
            return stack.enter_context(Prefetched(units, ahead=1, stall_seconds=math.inf))

        following = begun(first)
        for start in range(first, last + 1, LOT):
            units: Iterator[Any] = iter(following)
            # It is not asked for more than there are: its end takes a while.
            for number, unit in zip(range(start, min(start + LOT, last + 1)), units, strict=False):
                if number == start + LOT - AHEAD and start + LOT <= last:
                    following = begun(start + LOT)
                yield unit


def _lot(
    first: int, last: int, *, given: dict[str, Any], options: dict[str, Any], workers: int | None
) -> Iterator[tuple[Unit | None, dict[str, Any]]]:
    """Units of one execution."""
    import ray
    from ray.data._internal.datasource.range_datasource import RangeDatasource

    count = last - first + 1
    # ray.data.range would ask for a whole CPU per read; asking for the same share lets Ray fuse
    # reading and making into one task per unit.
    ids = RangeDatasource(n=count, block_format="arrow", column_name="id")
    dataset = ray.data.read_datasource(ids, override_num_blocks=count, **options).map_batches(
        _unit_block,  # type: ignore[arg-type]  # Ray's type leaves fn_kwargs out
        batch_size=1,
        fn_kwargs={**given, "first": first},
        concurrency=workers,
        **options,
    )
    # A work unit must arrive in its turn, whichever task finishes first.
    dataset.context.execution_options.preserve_order = True
    # A thread in every task that reads the process's memory map, for a figure nobody looks at.
    dataset.context.memory_usage_poll_interval_s = None
    blocks: Iterator[Any] = iter(
        dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    )
    expected = first
    try:
        for block in blocks:
            units = block["unit"].to_pylist()
            if units != [expected]:
                text = f"Ray Data delivered units {units} where unit {expected} was due: "
                raise RuntimeError(text + "blocks were dropped or reordered")
            yield _unpacked(block)
            expected += 1
        if expected != last + 1:
            text = f"Ray Data ended after unit {expected - 1}; unit {last} was to be the last"
            raise RuntimeError(text)
    except Exception as error:
        if (told := carried.unpacked(error)) is not error:
            raise told from None
        raise
    finally:
        getattr(blocks, "close", lambda: None)()


def _unit_block(
    rows: Any, *, recipe: Recipe, first: int, rank: int, world: int, shelf: Shelf | None
) -> Any:
    (number,) = (int(i) + first for i in rows["id"])

    def work() -> tuple[Unit | None, dict[str, Any]]:
        if shelf is None:
            return data.make_unit(recipe, number, rank, world), {}
        return _shelved(shelf, recipe, number, rank, world)

    unit, told = carried.packed(work)
    return _packed(number, unit, told)


def _shelved(
    shelf: Shelf, recipe: Recipe, number: int, rank: int, world: int
) -> tuple[Unit | None, dict[str, Any]]:
    """A unit of the cache on this machine, made where it is not there."""
    import ray

    here = ray.get_runtime_context().get_node_id() == shelf.node
    cache = _cache_here(shelf, recipe, rank, world)
    if cache.key != shelf.key:  # other code than the trial's: nobody may take it for the trial's
        return data.make_unit(recipe, number, rank, world), {"made": 1, "not_stored": 1}
    if here:
        unit = cache.unit(number, shelf.last)
        told = cache.news()
        return (None if cache.has(number) else unit), told
    if (found := cache.look(number)) is not None:
        return found, {"hits": 1}
    # The trial keeps it on its own machine.
    return data.make_unit(recipe, number, rank, world), {"keep": True}


_CACHES: dict[tuple[Any, ...], UnitCache] = {}


def _cache_here(shelf: Shelf, recipe: Recipe, rank: int, world: int) -> UnitCache:
    """One a process: what it knows of sizes and costs is worth keeping."""
    which = (shelf.settings.path, shelf.settings.gib, shelf.key, shelf.reader)
    if which not in _CACHES:
        _CACHES.clear()
        _CACHES[which] = UnitCache(shelf.settings, recipe, rank, world, reader=shelf.reader)
    return _CACHES[which]


def _packed(number: int, unit: Unit | None, told: dict[str, Any]) -> Any:
    """A table of one row: as plain bytes the samples cross without a copy."""
    import pyarrow as pa

    shapes = [list(array.shape) for array in unit or ()]
    columns = {
        "unit": pa.array([number], pa.int64()),
        "told": pa.array([json.dumps({"shapes": shapes, **told})]),
    }
    for name, array in zip(("inputs", "targets"), unit or (None, None), strict=True):
        size = 0 if array is None else array.nbytes
        buffer = pa.py_buffer(b"" if array is None else np.ascontiguousarray(array))
        offsets = pa.py_buffer(np.array([0, size], np.int64))
        columns[name] = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])
    return pa.table(columns)


def _unpacked(block: Any) -> tuple[Unit | None, dict[str, Any]]:
    told = json.loads(block["told"][0].as_py())
    if not (shapes := told.pop("shapes")):
        return None, told
    buffers = [block[name][0].as_buffer() for name in ("inputs", "targets")]
    inputs, targets = (
        np.frombuffer(buffer, np.int16).reshape(shape)
        for buffer, shape in zip(buffers, shapes, strict=True)
    )
    inputs.flags.writeable = targets.flags.writeable = False
    return (inputs, targets), told
