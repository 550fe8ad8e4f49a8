"""What a segment costs in CPU time, made by pure computing, by a torch DataLoader and by bgray's
feeds; and how many cores a GPU needs."""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bgray import bench_makers
from bgray.bench_turns import Candidate, apart, spread
from bgray.config import ConfigError, Experiment
from bgray.data import Recipe, make_unit

WHERE = "bench feed"
TURN_SECONDS = 4.0
"""CPU time of a turn, about."""
SHORT_UNITS = 2 * (os.cpu_count() or 1)
"""Of the shorter execution of Ray Data: so many that all of its workers have to start."""
CHEAP = ("bgray, feed cache", "copying alone")
CHEAP_UNITS = 128
"""Of those in a turn, at least: CPU time is counted in steps of a hundredth of a second."""
WANTED = 3200.0
"""Segments a second: 10,000 steps of 32 in 100 s."""

STANDARD = {
    "light": {
        "name": "light - decode and low-pass",
        "task": {"name": "unshift", "semitones": 12, "band_limit_target": True},
    },
    "heavy": {
        "name": "heavy - two pitch shifts each",
        "task": {"name": "deartifact", "shift": "on_the_fly"},
    },
}


def measured(
    experiment: Experiment,
    *,
    light: bool = False,
    heavy: bool = False,
    rounds: int = 3,
    units: int | None = None,
    ray: bool = True,
    wanted: float | None = None,
) -> dict[str, Any]:
    """Of the experiment's own stream and of the standard ones that are asked for. wanted: segments
    a second of the GPU that is to be fed."""
    least = [("--rounds", rounds, 1), ("--units", units, 1), ("--segments-per-second", wanted, 0.0)]
    problems = [(k, f"must be at least {m:g}, got {v}") for k, v, m in least if v and v < m]
    problems += [(k, "must be above 0") for k, v, _ in least if v == 0]
    if problems:
        raise ConfigError(WHERE, problems)
    streams = {experiment.name: experiment}
    streams |= {n: standard(n, experiment) for n, on in (("light", light), ("heavy", heavy)) if on}
    return {
        "cores": os.cpu_count() or 1,
        "rounds": rounds,
        "wanted": wanted or WANTED,
        "wanted_is_given": wanted is not None,
        "streams": {
            name: of_stream(one, rounds, units, ray, wanted or WANTED)
            for name, one in streams.items()
        },
    }


def standard(kind: str, experiment: Experiment) -> Experiment:
    """One of STANDARD, on built-in music at 48 kHz, with the experiment's batch and cache."""
    from bgray.experiment import absolute, resolve

    raw = {**STANDARD[kind], "model": {"name": "wav_unet"}, "data": {"segment": 32768}}
    raw["runtime"] = {"cache": experiment.runtime.cache}
    raw["train"] = {"batch_size": experiment.train.batch_size}
    return absolute(resolve(raw, WHERE))


def of_stream(
    experiment: Experiment, rounds: int, units: int | None, ray: bool, wanted: float
) -> dict[str, Any]:
    from bgray.experiment import build_recipe, prepare_data

    recipe = build_recipe(experiment, prepare_data(experiment))
    segments = recipe.batches_per_unit * recipe.batch_size  # of a unit
    runtime = experiment.runtime
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def start(name: str, work: Callable[..., None], *args: Any) -> tuple[Candidate, float]:
            one = stack.enter_context(Candidate(WHERE, name, work, recipe, *args))
            return one, one.quiet()

        pure, start_of_pure = start("pure computing", bench_makers.computing)
        unit_seconds = statistics.median(_turn(pure, 0, 1)["cpu_seconds"] for _ in range(2))
        number = units or max(1, round(TURN_SECONDS / max(unit_seconds, 0.01)))
        there = {"pure computing": (pure, start_of_pure)}
        there["torch DataLoader"] = start("torch DataLoader", bench_makers.loading)
        there["bgray, in process"] = start("bgray, in process", bench_makers.in_process)
        there["bgray, feed cache"] = start("bgray, feed cache", bench_makers.cached, folder)
        there["copying alone"] = start("copying alone", bench_makers.copying)
        if ray:
            # A CPU for each task, as where there are enough for both: nothing trains beside it.
            there["bgray, Ray Data"] = start(
                "bgray, Ray Data", bench_makers.on_ray, runtime.data_workers, 1.0
            )
            cold = _turn(there["bgray, Ray Data"][0], 0, SHORT_UNITS)["cpu_seconds"]
        else:
            cold = 0.0
        lots: dict[str, list[dict[str, float]]] = {name: [] for name in there}
        shorts, first = [], 1
        for _ in range(rounds):
            for name, (one, _) in there.items():
                if name == "bgray, Ray Data":
                    shorts.append(_turn(one, first, SHORT_UNITS))
                    lots[name].append(_turn(one, first, SHORT_UNITS + 2 * number))
                else:
                    many = max(number, CHEAP_UNITS) if name in CHEAP else number
                    lots[name].append(_turn(one, first, many))
            first += number
        # Units that each had made at its start, to have some ahead.
        ahead = {"torch DataLoader": 2 * (os.cpu_count() or 1), "bgray, in process": 1}
        ahead |= {"bgray, feed cache": bench_makers.KEPT_UNITS, "copying alone": 1}
        starts = {
            name: max(0.0, found - ahead.get(name, 0) * unit_seconds)
            for name, (_, found) in there.items()
        }
    rows: dict[str, Any] = {}
    for name, turns in lots.items():
        cpu = [turn["cpu_seconds"] / turn["units"] for turn in turns]
        if name == "bgray, Ray Data":
            pairs = list(zip(turns, shorts, strict=True))
            cpu = [(a["cpu_seconds"] - b["cpu_seconds"]) / (2 * number) for a, b in pairs]
            once = [b["cpu_seconds"] - SHORT_UNITS * c for b, c in zip(shorts, cpu, strict=True)]
            rows[name] = {
                "start_cpu_seconds": statistics.median(once),
                "cold_cpu_seconds": cold - SHORT_UNITS * statistics.median(cpu),
                "session": starts[name],
            }
        else:
            rows[name] = {"start_cpu_seconds": starts[name]}
        rows[name]["ms"] = spread([1000 * seconds / segments for seconds in cpu])
        own = [1000 * turn["own_cpu_seconds"] / turn["units"] / segments for turn in turns]
        rows[name]["consumer_ms"] = statistics.median(own)
    base = rows["pure computing"]["ms"]["rounds"]
    for row in rows.values():
        mine = row["ms"]["rounds"]
        row["efficiency"] = statistics.median(
            a / max(b, 1e-9) for a, b in zip(base, mine, strict=True)
        )
        row["over_ms"] = statistics.median(b - a for a, b in zip(base, mine, strict=True))
        row["segments_per_second_per_core"] = 1000 / max(1e-9, row["ms"]["median"])
        row["clear"] = apart(base, mine)
    hits = lots["bgray, feed cache"][-1].get("hits", 0)
    found = {
        "name": experiment.name,
        "units": number,
        "segments_per_unit": segments,
        "segment": recipe.segment,
        "sample_rate": recipe.sample_rate,
        "wire_bytes": wire_bytes(recipe),
        "disk": disk(recipe),
        "cache_hits": hits,
        "rows": rows,
    }
    if not hits:
        del rows["bgray, feed cache"]
    return {**found, "prediction": predicted(found, wanted)}


def _turn(one: Candidate, first: int, units: int) -> dict[str, float]:
    """CPU seconds of its whole process tree for so many units, what it makes ahead included."""
    before = one.quiet()
    answer = one.turn((first, units))
    return {**answer, "cpu_seconds": one.quiet() - before}


# --- what follows


def wire_bytes(recipe: Recipe) -> int:
    """Of one segment, as it travels: input and all sources of the target, int16."""
    small = dataclasses.replace(recipe, batch_size=1, batches_per_unit=1)
    return sum(array.nbytes for array in make_unit(small, 0))


def disk(recipe: Recipe) -> dict[str, float] | None:
    """Bytes read for a segment, and bytes a second from the disk, the page cache emptied of that
    file first. None where the shards are not on this machine."""
    import pyarrow.parquet as parquet

    from bgray import storage
    from bgray.data import groups_of

    if storage.is_remote(recipe.url):
        return None
    read = 0
    for shard, index in groups_of(recipe, 0):
        group = parquet.ParquetFile(Path(recipe.url) / shard).metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        read += sum(
            column.total_compressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] in recipe.task.voices
        )
    path = max(Path(recipe.url).glob("*.parquet"), key=lambda p: p.stat().st_size)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while os.read(handle, 2**20):
            pass
        seconds = time.perf_counter() - began
    finally:
        os.close(handle)
    segments = recipe.batch_size * recipe.batches_per_unit
    return {
        "bytes_per_segment": read / segments,
        "bytes_per_second": path.stat().st_size / seconds,
    }


def predicted(found: dict[str, Any], wanted: float) -> dict[str, Any]:
    """For each feed: cores at that speed, what would bound it on this machine, and the share of
    time that a GPU of that speed would wait. One core is the training's own."""
    cores, predictions = os.cpu_count() or 1, {}
    for name, row in found["rows"].items():
        if not name.startswith("bgray"):
            continue
        ms = row["ms"]["median"]
        makers = max(1, cores - 1) if name == "bgray, Ray Data" else 1
        supply = {"CPU": makers * 1000 / max(ms, 1e-9)}
        if name == "bgray, Ray Data":
            # The training's process takes every segment in, by one thread.
            supply["wire"] = 1000 / max(row["consumer_ms"], 1e-9)
        if name != "bgray, feed cache" and found["disk"]:
            at = found["disk"]
            supply["disk"] = at["bytes_per_second"] / max(1.0, at["bytes_per_segment"])
        bound = min(supply, key=supply.__getitem__)
        predictions[name] = {
            "cores_per_gpu": wanted * ms / 1000,
            "segments_per_second": supply,
            "bound": bound,
            "data_wait_expected": max(0.0, 1 - supply[bound] / wanted),
        }
    return predictions


# --- the table


def as_text(found: dict[str, Any]) -> str:
    lines = [
        f"CPU time of all processes that take part, {found['rounds']} rounds in turn, on "
        f"{found['cores']} cores"
    ]
    for one in found["streams"].values():
        lines += ["", *_stream_lines(one, found)]
    return "\n".join(lines)


def _stream_lines(one: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{one['name']}: segments of {one['segment']} samples at {one['sample_rate']} Hz, "
        f"{one['wire_bytes'] / 1000:.0f} kB each on the wire; {one['units']} units of "
        f"{one['segments_per_unit']} a turn"
    )
    yield (
        f"{'':20}{'ms/segment':>11}{'least':>9}{'most':>9}{'per s, core':>12}{'efficiency':>11}"
        f"{'over, ms':>9}{'consumer':>9}{'start, s':>9}"
    )
    for name, row in one["rows"].items():
        ms = row["ms"]
        fair = name not in ("bgray, feed cache", "copying alone")
        against = f"{row['efficiency']:11.3f}{row['over_ms']:9.3f}" if fair else f"{'':20}"
        yield (
            f"{name:20}{ms['median']:11.4f}{ms['least']:9.4f}{ms['most']:9.4f}"
            f"{row['segments_per_second_per_core']:12.0f}{against}{row['consumer_ms']:9.4f}"
            f"{row['start_cpu_seconds']:9.2f}"
            + ("" if row["clear"] or name == "pure computing" else "  (rounds overlap)")
        )
    copy, pure = (one["rows"][n]["ms"]["median"] for n in ("copying alone", "pure computing"))
    if cache := one["rows"].get("bgray, feed cache"):
        read = max(cache["ms"]["median"] - copy, 0.001)
        times = f"{(pure - copy) / read:.0f} times cheaper than making"
        yield f"a unit of the feed cache, without the copying: {read:.4f} ms a segment, {times}"
    else:
        yield "feed cache: it keeps no such units, they cost too little to make"
    if ray := one["rows"].get("bgray, Ray Data"):
        yield (
            f"Ray Data: the slope between {SHORT_UNITS} and {SHORT_UNITS + 2 * one['units']} "
            f"units; start: of an execution whose workers are there; of the first one "
            f"{ray['cold_cpu_seconds']:.1f} s CPU, of Ray itself {ray['session']:.1f} s"
        )
    if one["disk"]:
        at = one["disk"]
        yield (
            f"disk: {at['bytes_per_segment'] / 1000:.1f} kB read a segment, "
            f"{at['bytes_per_second'] / 1e6:.0f} MB/s from it"
        )
    speed = (
        "the GPU's speed as given" if found["wanted_is_given"] else "10,000 steps of 32 in 100 s"
    )
    yield f"to feed {found['wanted']:.0f} segments/s ({speed}):"
    for name, told in one["prediction"].items():
        supply = ", ".join(f"{k} {v:.0f}" for k, v in told["segments_per_second"].items())
        yield (
            f"  {name:20}{told['cores_per_gpu']:7.2f} cores per GPU; here at most {supply} "
            f"segments/s: bound by {told['bound']}, data wait expected: "
            f"{told['data_wait_expected']:.0%}"
        )
