"""What a sweep costs besides its steps: the way from one trial to the next, in warm processes and
in new ones; trials an hour, one at a time and as many as the plan says."""

import contextlib
import dataclasses
import io
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from bgray.config import ConfigError, Experiment, FeedCache

WANTED_SECONDS = 4.0
"""From the end of a trial to the first step of the next one in its process."""
WAYS = ("warm", "cold", "plan", "threads")
FEED_GIB = 8.0


def measured(
    experiment: Experiment,
    *,
    own_trials: int = 1,
    trials: int = 4,
    steps: int = 30,
    rounds: int = 2,
    all_threads: bool = False,
) -> dict[str, Any]:
    """Real sweeps of `trials` trials of `steps` steps, in turn, `rounds` times, in folders that are
    removed again: warm (one process for all trials, one trial at a time), cold (a new process
    each), and plan (warm, as many at a time as the plan of the experiment's own sweep of
    `own_trials` says). What differs between the trials is the learning rate, a little, so that they
    see the same data.

    all_threads: without a GPU also threads (warm, one at a time with all the machine's threads).
    Where another program uses one of them too, they wait for each other: minutes a step.
    """
    import torch

    from bgray.context import pick_device
    from bgray.experiment import prepare_data
    from bgray.resources import Plan, of_cluster
    from bgray.session import ray_session

    if trials < 3:
        raise ConfigError("bench sweep", [("--trials", f"{trials}: the gaps take three or more")])
    gpu = pick_device(experiment.runtime.device).type == "cuda"
    prepare_data(experiment)
    found: dict[str, Any] = {way: [] for way in WAYS}
    with ray_session() as ray:
        plan = Plan.make(experiment, max(own_trials, trials), of_cluster(ray))
        cpus = os.cpu_count() or 1
        last = all_threads and not gpu and (plan.concurrency, plan.threads) != (1, cpus)
        for _ in range(rounds):
            for way in WAYS if last else WAYS[:3]:
                at_a_time = None if way == "plan" else 1
                threads = cpus if way == "threads" else None if gpu else plan.threads
                one = _short(experiment, steps, at_a_time, threads)
                # So many that there are two turns, also where several share a GPU.
                several = 2 * max(trials if gpu else 0, plan.concurrency)
                count = max(trials, several) if way == "plan" else trials
                found[way].append(_swept(one, count, warm=way != "cold"))
    device = torch.cuda.get_device_name() if gpu else f"{cpus} CPUs"
    return {"device": device, "steps": steps, **_figures(found, experiment, plan, own_trials, gpu)}


# --- the sweeps


def _short(
    experiment: Experiment, steps: int, at_a_time: int | None, threads: int | None
) -> Experiment:
    """With all that it would choose for its real length written down."""
    from bgray.choices import choose
    from bgray.context import pick_device

    made = choose(experiment, pick_device(experiment.runtime.device)).applied(experiment)
    runtime = dataclasses.replace(
        made.runtime,
        concurrency=at_a_time or made.runtime.concurrency,
        threads=threads or made.runtime.threads,
        log_every=min(made.runtime.log_every, steps),
        checkpoint_every=steps,
    )
    train = dataclasses.replace(made.train, steps=steps)
    validation = dataclasses.replace(made.validation, every=steps)
    return dataclasses.replace(made, train=train, runtime=runtime, validation=validation)


def _swept(experiment: Experiment, count: int, *, warm: bool) -> list[dict[str, Any]]:
    """What each trial of one sweep left of its times, in the order of their starts."""
    from bgray.build import build_task
    from bgray.experiment import data_hash
    from bgray.search import make_trial
    from bgray.sweep import run_sweep
    from bgray.sweep_config import Sweep

    metric, mode = next(iter(build_task(experiment).scores.items()))
    with tempfile.TemporaryDirectory(prefix="bgray-bench-") as folder, _reuse(warm):
        cache: Any = experiment.runtime.feed_cache
        if cache != "none":
            cache = FeedCache(path=f"{folder}/feed", gib=FEED_GIB)
        runtime = dataclasses.replace(experiment.runtime, results=folder, feed_cache=cache)
        trials = []
        for i in range(count):
            options = dict(experiment.optim.options)
            options["lr"] = options["lr"] * (1 + 1e-3 * i)
            optim = dataclasses.replace(experiment.optim, options=options)
            one = dataclasses.replace(experiment, runtime=runtime, optim=optim)
            trials.append(make_trial(f"rate {i}", one, data_hash(one)))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = run_sweep(Sweep(base={}, metric=metric, mode=mode), trials)
        if code:
            last = [line for line in said.getvalue().splitlines() if line.strip()][-1:]
            raise ConfigError("bench sweep", [("", f"a trial failed: {' '.join(last)}")])
        runs = [_times(trial.url) for trial in trials]
    return sorted(runs, key=lambda run: run["entered_at"])


@contextlib.contextmanager
def _reuse(wanted: bool) -> Iterator[None]:
    from bgray.warm import SWITCH

    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1" if wanted else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def _times(url: str) -> dict[str, Any]:
    from bgray.records import METRICS, read_info

    info = read_info(url) or {}
    timing, cache = info["timing"], info.get("feed_cache") or {}
    taken = cache.get("hits", 0) + cache.get("made", 0)
    return {
        **{key: info["attempts"][-1].get(key) for key in ("warm", "entered_at", "first_step_at")},
        "parts": info["attempts"][-1]["start_seconds"],
        # The last line of its last step.
        "ended_at": os.path.getmtime(f"{url}/{METRICS}"),
        "steps_per_second": timing["steps_per_second"],
        "step_seconds": timing["train_seconds"] + timing["warm_up_seconds"],
        "other_seconds": timing["other_seconds"],
        "hit_rate": cache.get("hits", 0) / taken if taken else None,
    }


# --- the figures

BETWEEN = "tune"
"""From the last line of one trial until the next one's function is entered: Tune, checkpoint and
records of the one before; in a new process its start and imports, too."""


def _figures(
    found: dict[str, list[list[dict[str, Any]]]],
    experiment: Experiment,
    plan: Any,
    own: int,
    gpu: bool,
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for way in ("warm", "cold"):
        gaps, parts = [], []
        for runs in found[way]:
            for before, run in zip(runs, runs[1:], strict=False):
                gaps.append(run["first_step_at"] - before["ended_at"])
                between = {BETWEEN: run["entered_at"] - before["ended_at"]}
                parts.append({**between, **run["parts"]})
        names = dict.fromkeys(name for part in parts for name in part)
        facts[way] = {
            "gap_seconds": statistics.median(gaps),
            "gaps": [round(gap, 3) for gap in gaps],
            "parts": {
                name: round(statistics.median(part.get(name, 0.0) for part in parts), 3)
                for name in names
            },
            "warm": [run["warm"] for runs in found[way] for run in runs[1:]],
        }
    rates = {way: [_per_hour(runs) for runs in rounds] for way, rounds in found.items() if rounds}
    facts["trials_per_hour"] = {way: [round(rate, 1) for rate in r] for way, r in rates.items()}
    facts["at_a_time"] = max(_at_a_time(runs) for runs in found["plan"])
    facts["threads"] = None if gpu else plan.threads
    facts["plan_to_one"] = statistics.median(
        a / b for a, b in zip(rates["plan"], rates["warm"], strict=True)
    )
    later = [run for runs in found["warm"] for run in runs[1:]]
    rates_hit = [run["hit_rate"] for run in later if run["hit_rate"] is not None]
    facts["hit_rate"] = statistics.mean(rates_hit) if rates_hit else None
    facts["under_4_s"] = facts["warm"]["gap_seconds"] < WANTED_SECONDS
    return {**facts, "forecast": _forecast(facts, found["plan"], experiment, own)}


def _at_a_time(runs: Sequence[dict[str, Any]]) -> int:
    """How many were at their steps when another one began its own."""
    return max(
        sum(run["first_step_at"] <= one["first_step_at"] < run["ended_at"] for run in runs)
        for one in runs
    )


def _per_hour(runs: Sequence[dict[str, Any]]) -> float:
    """From when the first one's process has come up; the others' starts are in it."""
    return 3600 * len(runs) / (max(run["ended_at"] for run in runs) - runs[0]["entered_at"])


def _forecast(
    facts: dict[str, Any],
    rounds: list[list[dict[str, Any]]],
    experiment: Experiment,
    own: int,
) -> dict[str, Any]:
    """Of the experiment's own sweep, every trial to its end."""
    runs = [run for runs in rounds for run in runs]
    speed = statistics.median(run["steps_per_second"] or math.nan for run in runs)
    evaluation = statistics.median(run["other_seconds"] for run in runs)
    train, every = experiment.train.steps, experiment.validation.every
    inside = train / speed
    outside = {
        way: facts[way]["gap_seconds"] + evaluation * math.ceil(train / every)
        for way in ("warm", "cold")
    }
    turns = math.ceil(own / facts["at_a_time"])
    return {
        "trials": own,
        "steps": train,
        "steps_per_second": speed,
        "hours": turns * (inside + outside["warm"]) / 3600,
        "hours_cold": turns * (inside + outside["cold"]) / 3600,
        "outside_share": outside["warm"] / (inside + outside["warm"]),
        "outside_share_cold": outside["cold"] / (inside + outside["cold"]),
    }


def as_text(found: dict[str, Any]) -> str:
    """The tables for a person."""
    warm, cold, rates = found["warm"], found["cold"], found["trials_per_hour"]
    lines = [f"{found['device']}; trials of {found['steps']} steps, medians in seconds", ""]
    lines.append(f"{'from one trial to the next':34} {'warm':>8} {'cold':>8}")
    names = dict.fromkeys([*cold["parts"], *warm["parts"]])
    for name in names:
        if name == "first_step":
            continue
        row = [warm["parts"].get(name, 0.0), cold["parts"].get(name, 0.0)]
        lines.append(f"  {PARTS.get(name, name):32} {row[0]:8.2f} {row[1]:8.2f}")
    lines.append(f"{'in all':34} {warm['gap_seconds']:8.2f} {cold['gap_seconds']:8.2f}")
    step = [each["parts"].get("first_step", 0.0) for each in (warm, cold)]
    lines.append(f"{PARTS['first_step']:34} {step[0]:8.2f} {step[1]:8.2f}")
    said = "yes" if found["under_4_s"] else "no"
    spread = f"{min(warm['gaps']):.2f} to {max(warm['gaps']):.2f}"
    lines.append(f"under {WANTED_SECONDS:g} s in a warm process: {said} ({spread})")
    if not all(warm["warm"]):
        lines.append(f"  {warm['warm'].count(False)} of {len(warm['warm'])} were not warm at all")
    lines += ["", "trials an hour"]
    at, threads = found["at_a_time"], found["threads"]
    texts = {
        "warm": "one at a time, warm",
        "cold": "one at a time, a new process each",
        "plan": f"the plan: {at} at a time" + (f", {threads} threads each" if threads else ""),
        "threads": "one at a time, all threads",
    }
    for way, values in rates.items():
        rounds = ", ".join(f"{value:.0f}" for value in values)
        lines.append(f"  {texts[way]:32} {statistics.median(values):8.0f} ({rounds})")
    lines.append(f"the plan / one at a time: {found['plan_to_one']:.2f}{_why_not_more(found)}")
    rate = found["hit_rate"]
    text = "no feed cache" if rate is None else f"{100 * rate:.0f} % of the work units"
    lines.append(f"feed cache, from the second trial on: {text}")
    guess = found["forecast"]
    lines += [
        "",
        f"its own sweep, {guess['trials']} trials of {guess['steps']} steps, all to the end: "
        f"{guess['hours']:.2g} h; outside of steps {100 * guess['outside_share']:.1f} %",
        f"with a new process each: {guess['hours_cold']:.2g} h; "
        f"{100 * guess['outside_share_cold']:.1f} %",
    ]
    return "\n".join(lines)


def _why_not_more(found: dict[str, Any]) -> str:
    """What keeps several trials on one GPU from being worth it, where they are not."""
    if found["threads"] is not None or found["plan_to_one"] >= WORTH_PACKING:
        return ""
    if found["at_a_time"] == 1:
        return ": a trial holds more than half of a GPU's memory (runtime.vram, vram.json)"
    text = ": alone, a trial keeps the GPU busy already; without CUDA MPS the kernels of several "
    return text + "processes take turns and do not run side by side"


WORTH_PACKING = 1.5
PARTS = {
    BETWEEN: "Tune; a new process with imports",
    "clean": "cleaning up",
    "imports": "imports in the trial",
    "data": "manifest of the data",
    "model": "net, optimizer, losses",
    "record": "the run's record",
    "validation": "validation set",
    "baseline": "score of doing nothing",
    "first_batch": "first batch",
    "first_step": "first step (compilation, warm-up)",
}
