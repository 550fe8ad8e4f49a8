"""Questions to which a measured step is the answer: are the targets met, does time grow linearly,
does memory stay."""

import copy
import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bgray import bench_step, bench_trial
from bgray.bench_step import WHERE, Options, gib_of
from bgray.bench_turns import Candidate, Link
from bgray.config import ConfigError, Experiment
from bgray.experiment import Prepared
from bgray.problems import unknown

# --- the nets of log 002, and what is wanted of them on one H100

NETS: dict[str, dict[str, Any]] = {
    "output19": {"kernels": [7, 23, 41]},
    "output0": {
        "channels": [8, 32, 128, 256, 512],
        "blocks": [1, 3, 4, 4],
        "factors": [8, 8, 4, 2],
        "scale_vs_channels": [2, 2, 2, 1],
        "bottleneck_blocks": 4,
        "patching": 1,
        "kernels": [41],
        "norm": "layer",
    },
    "output5": {
        "channels": [32, 64, 128, 256, 512],
        "blocks": [1, 3, 3, 3],
        "factors": [2, 4, 8, 8],
        "scale_vs_channels": [1, 2, 4, 4],
        "bottleneck_blocks": 3,
        "patching": 1,
        "kernels": [41],
        "norm": "layer",
    },
    "output12": {"channels": [32, 64, 128, 256, 512], "kernels": [41], "norm": "layer"},
}
LOG_MINUTES = {"output19": 40, "output0": 29, "output5": 79, "output12": 40}
"""To 10,000 steps on the log's GPU, of 24 GB."""
SECONDS = {"output19": 100.0, "output0": 90.0, "output5": 240.0}
LOG_GB = {"output5": 21.0, "output12": 7.0}
MOST_WAIT, LEAST_OF_BARE = 0.02, 0.98
ON_RAY = "output19"
"""The net whose run on Ray is compared with the bare loop."""


def net(name: str, overrides: tuple[str, ...] = (), batch: int | None = None) -> Experiment:
    """Log 002's protocol: multi_mel + 10 l1, Muon at 5e-3, 32 x 32768 samples at 48 kHz."""
    from bgray.document import override
    from bgray.experiment import absolute, resolve

    if name not in NETS:
        raise ConfigError(WHERE, [("--targets", unknown(name, NETS))])
    raw = {
        "name": name,
        "task": {"name": "unshift", "semitones": 12},
        "model": {"name": "wav_unet", **copy.deepcopy(NETS[name])},
        "loss": {"multi_mel": 1.0, "l1": 10.0},
        "optim": {"name": "muon", "lr": 5.0e-3},
        "train": {"steps": 10_000, "batch_size": batch or 32},
    }
    override(raw, overrides, WHERE)
    return absolute(resolve(raw, WHERE))


def targets(
    names: Sequence[str], options: Options, batch: int | None, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What is measured of each net (all of them where none is named), and the rows of the table."""
    experiments = {name: net(name, overrides, batch) for name in names or NETS}
    measured = {
        name: bench_step.measured(
            experiment,
            dataclasses.replace(
                options, ray=name == ON_RAY, split=options.split and name == ON_RAY
            ),
        )
        for name, experiment in experiments.items()
    }
    first = next(iter(measured.values()))
    return {
        "device": first["device"],
        "batch": first["batch"],
        "rounds": options.rounds,
        "rows": [row for name, found in measured.items() for row in rows_of(name, found)],
        "nets": measured,
    }


def rows_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each a line of the table: what, unit, the log's figure, the wanted one, the measured one,
    that of the plainest loop here, and whether it is met (None: nothing is wanted)."""
    own, plain = found["candidates"]["bgray"], found["candidates"].get("plainest")

    def row(what: str, unit: str, log: Any, wanted: Any, here: float, plainest: Any, least: bool):
        met = None if wanted is None else bool(here >= wanted if least else here <= wanted)
        return {
            "what": f"{name}: {what}",
            "unit": unit,
            "log": log,
            "wanted": wanted,
            "measured": here,
            "plainest": plainest,
            "met": met,
        }

    def seconds(one: dict[str, Any]) -> float:
        return 10_000 / one["steps_per_second"]["median"]

    def gb(one: dict[str, Any]) -> float:
        return gib_of(one) * 2**30 / 1e9

    there = plain if plain and "error" not in plain else None
    rows = [
        row(
            "10k steps", "s", 60 * LOG_MINUTES[name], SECONDS.get(name), seconds(own),
            there and seconds(there), False,
        )
    ]  # fmt: skip
    log = LOG_GB.get(name)
    rows.append(
        row(
            "peak memory", "GB", log, None if log is None else log / 2, gb(own),
            there and gb(there), False,
        )
    )  # fmt: skip
    if "on Ray" in found["candidates"]:
        wait = found["candidates"]["on Ray"]["data_wait_share"]
        rows.append(row("data wait, on Ray", "", None, MOST_WAIT, wait, None, False))
        ratio = found["ray_ratio"]["median"]
        rows.append(row("on Ray / bare loop", "", None, LEAST_OF_BARE, ratio, None, True))
    return rows


def targets_text(found: dict[str, Any]) -> str:
    gpu = "CPU" not in found["device"]
    lines = [
        f"log 002's nets on {found['device']}, batch {found['batch']} x 32768, "
        f"{found['rounds']} rounds in turn with the plainest loop (eager, float32)"
    ]
    if not gpu:
        lines.append(
            "The wanted figures are one H100's, at batch 32: on a CPU this is a check of itself, "
            "and memory is the resident memory of a process."
        )
    lines += ["", f"{'':30}{'log':>10}{'wanted':>10}{'measured':>10}{'plainest':>10}  met"]
    for row in found["rows"]:
        figures = [row[key] for key in ("log", "wanted", "measured", "plainest")]
        cells = "".join("{:>10}".format("-" if v is None else f"{v:.4g}") for v in figures)
        met = {None: "", True: "yes", False: "no"}[row["met"] if gpu else None]
        lines.append(f"{row['what'] + (row['unit'] and ', ' + row['unit']):30}{cells}  {met}")
    for name, one in found["nets"].items():
        lines += ["", f"--- {name}", bench_step.as_text(one)]
    return "\n".join(lines)


# --- how time grows


def scaled(experiment: Experiment, options: Options) -> dict[str, Any]:
    """Seconds of a step at three batch sizes and three segments (all candidates in turn), of three
    numbers of steps; and the lines through them."""
    from bgray.conflicts import conflicts
    from bgray.context import pick_device
    from bgray.experiment import prepare_data

    bench_step.check(options)
    device, prepared = pick_device(experiment.runtime.device), prepare_data(experiment)
    base, batch = experiment.data.segment, experiment.train.batch_size
    own = bench_trial.pinned(experiment, device)

    def other(size: int, segment: int) -> Experiment:
        train = dataclasses.replace(own.train, batch_size=size)
        data = dataclasses.replace(own.data, segment=segment)
        return dataclasses.replace(own, train=train, data=data)

    # Half of it may be too short for the model or a loss.
    fits = base % 2 == 0 and not list(conflicts(other(batch, base // 2)))
    segments = [n * base // 2 for n in ((1, 2, 4) if fits else (2, 4, 8))]
    shapes = dict.fromkeys([(n * batch, base) for n in (1, 2, 4)] + [(batch, s) for s in segments])
    with ExitStack() as stack:
        there = {
            shape: stack.enter_context(
                Candidate(
                    WHERE, f"{shape[0]} x {shape[1]}", bench_trial.as_trial, other(*shape), prepared
                )
            )
            for shape in shapes
        }
        lots = bench_step.lots_of(list(there.values()), options)
        seconds = {
            shape: statistics.median(turn["seconds"] / turn["steps"] for turn in lots[one.name])
            for shape, one in there.items()
        }
        one = there[batch, base]
        number = bench_step.steps_of(one.ready, options)
        totals = [
            (n * number, statistics.median(one.turn((0, n * number))["seconds"] for _ in range(2)))
            for n in (1, 2, 4)
        ]
    points = {
        "batch": [(n * batch, seconds[n * batch, base]) for n in (1, 2, 4)],
        "segment": [(s, seconds[batch, s]) for s in segments],
        "steps": totals,
    }
    return {
        "name": experiment.name,
        "device": bench_step.name_of(device),
        "rounds": options.rounds,
        "lines": {key: {"points": some, **line_through(some)} for key, some in points.items()},
    }


def line_through(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Least squares: `slope`, `intercept`, `r2`; and `exponent`, the slope of the logarithms: 1 is
    proportional, less has a part that does not grow."""
    x, y = zip(*points, strict=True)
    fitted = statistics.linear_regression(x, y)
    logs = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y])
    r2 = 1.0 if len(set(y)) == 1 else statistics.correlation(x, y) ** 2
    return {
        "slope": fitted.slope,
        "intercept": fitted.intercept,
        "r2": r2,
        "exponent": logs.slope,
    }


def scaling_text(found: dict[str, Any]) -> str:
    lines = [f"{found['name']} on {found['device']}, median of {found['rounds']} rounds in turn"]
    for key, line in found["lines"].items():
        what = "seconds in all" if key == "steps" else "ms a step"
        scale = 1 if key == "steps" else 1000
        some = ", ".join(f"{x:g}: {scale * y:.3f}" for x, y in line["points"])
        share = line["intercept"] / line["points"][1][1]
        lines.append(
            f"{key:8} {what}: {some}; line R^2 {line['r2']:.4f}, intercept {share:.1%} of the "
            f"middle one, exponent {line['exponent']:.3f}"
        )
    return "\n".join(lines)


# --- memory over many steps

TENTHS = 10
GROWTH = 0.02


def soaked(steps: int) -> dict[str, Any]:
    """Resident memory (MiB) of a process after each tenth of a tiny net's run, with everything that
    a run does: evaluations, clips, checkpoints, records."""
    experiment = soak_experiment(steps)
    from bgray.experiment import prepare_data

    with Candidate(WHERE, "soak", _soak, experiment, prepare_data(experiment)) as one:
        rss = one.ready
    start, end = rss[TENTHS // 5 - 1], rss[-1]
    return {"steps": steps, "rss_mib": rss, "growth": (end - start) / start}


def soak_experiment(steps: int) -> Experiment:
    """ConfigError where there are too few steps to say anything."""
    if steps < 100:
        raise ConfigError(WHERE, [("--soak", f"must be at least 100 steps, got {steps}")])
    from bgray.experiment import absolute, resolve

    raw = {
        "name": "soak",
        "task": {"name": "unshift"},
        "data": {
            "sample_rate": 16000,
            "segment": 2048,
            "builtin_songs": 8,
            "builtin_seconds": 10.0,
        },
        "model": {
            "name": "wav_unet",
            "channels": [4, 8, 16],
            "blocks": [1, 1],
            "factors": [2, 4],
            "scale_vs_channels": [1, 2],
            "bottleneck_blocks": 1,
            "patching": 1,
            "kernels": [7],
        },
        "train": {"steps": steps, "batch_size": 4},
        "validation": {"every": max(1, steps // 20), "segment": 4096, "items": 4, "clips": 1},
        "runtime": {"device": "cpu", "threads": 1},
    }
    return absolute(resolve(raw, WHERE))


def _soak(link: Link, experiment: Experiment, prepared: Prepared) -> None:
    from bgray.loop import fit

    steps, found = experiment.train.steps, []

    def soaking(*args: Any, report: Any, **options: Any) -> Any:
        def reported(kind: str, step: int, values: dict[str, Any]) -> None:
            report(kind, step, values)
            if kind == "train" and step * TENTHS >= (len(found) + 1) * steps:
                found.append(rss_mib())

        return fit(*args, report=reported, **options)

    bench_trial.run(experiment, prepared, soaking)
    link.answer(found)


def rss_mib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak_text(found: dict[str, Any]) -> str:
    tenths = ", ".join(f"{value:.1f}" for value in found["rss_mib"])
    met = "met" if found["growth"] < GROWTH else "not met"
    return (
        f"resident MiB after each tenth of {found['steps']} steps: {tenths}\n"
        f"growth from a fifth on: {found['growth']:+.2%} (wanted: under {GROWTH:.0%}: {met})"
    )
