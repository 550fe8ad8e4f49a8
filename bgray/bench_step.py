"""What a training step takes on this machine: against the plainest loop that does the same, its
parts, its floor, and what follows for 10,000 steps."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from bgray import bench_split, bench_trial, devices
from bgray.bench_trial import FIRST_WRITTEN, IN_MEMORY, ONE_BY_ONE
from bgray.bench_turns import Candidate, apart, spread
from bgray.choices import Choices, choose
from bgray.config import ConfigError, Experiment
from bgray.experiment import Prepared
from bgray.probes import GIB, TARGET_STEPS

WHERE = "bench step"
LEAD_IN = 12
"""Steps before the clock starts again, at most: what was made ahead while others had their turn
(4 batches and a work unit of 8) is used up then."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Of one measurement."""

    rounds: int = 3
    seconds: float = 5.0
    """Timed in each turn, about."""
    steps: int | None = None
    """Timed in each turn; None: as many as `seconds` hold, at least 2."""
    choices: bool = False
    ray: bool = False
    split: bool = True
    profile: bool = False
    trace: str | None = None


def check(options: Options) -> None:
    least = [("--rounds", options.rounds, 1), ("--steps", options.steps, 1)]
    found = [(k, f"must be at least {m}, got {v}") for k, v, m in least if v is not None and v < m]
    if options.seconds <= 0:
        found.append(("--seconds", f"must be above 0, got {options.seconds:g}"))
    if found:
        raise ConfigError(WHERE, found)


def measured(experiment: Experiment, options: Options) -> dict[str, Any]:
    """All of it, as plain data. ConfigError where the data do not fit, or a candidate fails."""
    check(options)
    from bgray.build import num_parameters
    from bgray.context import pick_device
    from bgray.experiment import meta_model, prepare_data

    device = pick_device(experiment.runtime.device)
    prepared = prepare_data(experiment)
    chosen = choose(experiment, device)
    train, data = experiment.train, experiment.data
    found: dict[str, Any] = {
        "name": experiment.name,
        "device": name_of(device),
        "threads": bench_trial.threads_of(experiment),
        "parameters": num_parameters(meta_model(experiment)),
        "batch": train.batch_size,
        "segment": data.segment,
        "channels": data.channels,
        "rounds": options.rounds,
        "chosen": chosen.record(),
    }
    own = bench_trial.pinned(experiment, device)
    found |= _in_turn(own, prepared, options, device, chosen)
    if options.split:
        warm_up = bench_trial.WARM_UP[device.type][0]
        steps = found["candidates"]["bgray"]["steps"]
        with Candidate(WHERE, "split", bench_split.split, own, prepared, warm_up, steps) as one:
            found["split"] = one.ready
        found["split_steps"] = steps
        with Candidate(WHERE, "floor", bench_split.floor, own, prepared) as one:
            found["floor"] = {**one.ready, **_floor(one.ready, chosen.precision, found, device)}
    if options.profile or options.trace:
        trace = options.trace and os.path.abspath(options.trace)
        arguments = (own, prepared, bench_trial.WARM_UP[device.type][0], 3, trace)
        with Candidate(WHERE, "profile", bench_split.profile, *arguments) as one:
            found["profile"] = one.ready
    return {**found, "prediction": _prediction(experiment, prepared, found)}


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"


# --- candidates in turn


def _in_turn(
    own: Experiment, prepared: Prepared, options: Options, device: torch.device, chosen: Choices
) -> dict[str, Any]:
    start = functools.partial(Candidate, WHERE)
    found: dict[str, Any] = {"candidates": {}, "choices": {}}
    with start("bgray", bench_trial.as_trial, own, prepared) as bgray:
        try:
            with start("plainest", bench_trial.plainest, own, prepared) as plainest:
                lots = lots_of([plainest, bgray], options)
            found["ratio"] = _ratio(lots["bgray"], lots["plainest"])
        except ConfigError as error:  # too much for this GPU, most likely
            lots = lots_of([bgray], options)
            found["failed"] = _why(error)
        found["candidates"] = {name: _summary(turns) for name, turns in lots.items()}
        if options.ray:
            # Ray Data is told at its start how many batches there will be.
            turn = LEAD_IN + steps_of(bgray.ready, options)
            total = 100 + (options.rounds + 1) * 2 * turn
            train = dataclasses.replace(own.train, steps=total)
            runtime = dataclasses.replace(own.runtime, feed="ray")
            there = dataclasses.replace(own, train=train, runtime=runtime)
            steps = steps_of(bgray.ready, options)
            with (
                start("bare", bench_trial.as_trial, own, prepared, IN_MEMORY) as bare,
                start("on Ray", bench_trial.on_ray, there, prepared) as one,
            ):
                lots = lots_of([bare, one], options, steps)
            found["candidates"] |= {name: _summary(turns) for name, turns in lots.items()}
            found["ray_ratio"] = _ratio(lots["on Ray"], lots["bare"])
        for name, work, changed in others(chosen, device) if options.choices else ():
            arguments = (changed.applied(own), prepared, work)
            try:
                with start(name, bench_trial.as_trial, *arguments) as one:
                    lots = lots_of([bgray, one], options)
            except ConfigError as error:
                found["choices"][name] = {"error": _why(error)}
                continue
            ratio = _ratio(lots[name], lots["bgray"])
            found["choices"][name] = {**_summary(lots[name]), "ratio": ratio}
    return found


def _why(error: ConfigError) -> str:
    return str(error).partition("\n")[2].strip()


def others(chosen: Choices, device: torch.device) -> Iterator[tuple[str, str, Choices]]:
    """Each choice alone the other way: (name, what is taken away that no option switches,
    choices)."""

    def changed(**fields: Any) -> Choices:
        return dataclasses.replace(chosen, **fields)

    gpu = device.type == "cuda"
    for precision in ("fp32", "tf32", "bf16") if gpu else ("bf16",):
        if precision != chosen.precision:
            yield f"precision {precision}", "", changed(precision=precision)
    yield f"{_no(chosen.compile)}compile", "", changed(compile=not chosen.compile)
    if gpu:
        graphs = not chosen.cuda_graphs
        yield f"{_no(chosen.cuda_graphs)}CUDA graph", "", changed(cuda_graphs=graphs)
    other = "library" if chosen.depthwise == "auto" else "auto"
    yield f"depthwise {other}", "", changed(depthwise=other)
    yield f"{_no(chosen.recompute)}recompute", "", changed(recompute=not chosen.recompute)
    yield "optimizer tensor by tensor", ONE_BY_ONE, chosen
    yield "net and losses as first written", FIRST_WRITTEN, chosen


def _no(on: bool) -> str:
    return "no " if on else ""


def steps_of(step_seconds: float, options: Options) -> int:
    return options.steps or max(2, round(options.seconds / step_seconds))


def lots_of(
    candidates: list[Candidate], options: Options, steps: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    lots: dict[str, list[dict[str, Any]]] = {one.name: [] for one in candidates}
    for _ in range(options.rounds):
        for one in candidates:
            number = steps or steps_of(one.ready, options)
            lots[one.name].append(one.turn((min(LEAD_IN, number // 2), number)))
    return lots


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    last, seconds = turns[-1], sum(turn["seconds"] for turn in turns)
    return {
        "steps": last["steps"],
        "steps_per_second": spread([turn["steps"] / turn["seconds"] for turn in turns]),
        "cpu_seconds_per_step": spread([turn["cpu_seconds"] / turn["steps"] for turn in turns]),
        "data_wait_share": sum(turn["wait_seconds"] for turn in turns) / seconds,
        **{key: last[key] for key in ("rss_peak_gib", "vram_peak_gib", "vram_reserved_gib")},
    }


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of steps per second, round by round; `clear`: no round of one is within those of the
    other."""
    a, b = ([turn["steps"] / turn["seconds"] for turn in turns] for turns in (ours, theirs))
    ratios = spread([x / y for x, y in zip(a, b, strict=True)])
    cpu = [
        (y["cpu_seconds"] / y["steps"]) / (x["cpu_seconds"] / x["steps"])
        for x, y in zip(ours, theirs, strict=True)
    ]
    return {**ratios, "clear": apart(a, b), "by_cpu": spread(cpu)["median"]}


# --- what follows


def _floor(
    counts: dict[str, Any], precision: str, found: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    peak = devices.peak_of(device, found["threads"])
    if peak is None:
        return {"peak": None}
    least = bench_split.floor_seconds(counts, precision, peak)
    seconds = 1 / found["candidates"]["bgray"]["steps_per_second"]["median"]
    share = max(least["compute"], least["memory"]) / seconds
    return {"peak": peak.record(), **least, "share": share}


def _prediction(
    experiment: Experiment, prepared: Prepared, found: dict[str, Any]
) -> dict[str, Any]:
    """Minutes to 10,000 steps, as measured and without what it waited for data; CPU cores that
    make its segments at this speed, from work units made here and now."""
    own = found["candidates"]["bgray"]
    seconds = 1 / own["steps_per_second"]["median"]
    ms = unit_ms(experiment, prepared)
    segments = experiment.train.batch_size / (seconds * (1 - own["data_wait_share"]))
    return {
        "minutes_to_10k": TARGET_STEPS * seconds / 60,
        "minutes_to_10k_without_wait": TARGET_STEPS * seconds * (1 - own["data_wait_share"]) / 60,
        "segments_per_second": segments,
        "cpu_ms_per_segment": ms,
        "cores_per_gpu": segments * ms / 1000,
    }


def unit_ms(experiment: Experiment, prepared: Prepared, seconds: float = 1.0) -> float:
    """CPU milliseconds of one segment, made in this thread."""
    from bgray.data import make_unit
    from bgray.experiment import build_recipe

    recipe = build_recipe(experiment, prepared)
    make_unit(recipe, 0)
    began, units = time.thread_time(), 0
    while units < 1 or time.thread_time() - began < seconds:
        units += 1
        make_unit(recipe, units)
    segments = units * recipe.batches_per_unit * recipe.batch_size
    return 1000 * (time.thread_time() - began) / segments


# --- the table


def as_text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['name']}: {found['parameters'] / 1e6:.2f}M parameters, batch {found['batch']} x "
        f"{found['channels']} x {found['segment']}, on {found['device']} with {found['threads']} "
        f"threads; {found['rounds']} rounds, in turn, each in a process of its own",
        *(f"  {reason}" for reason in found["chosen"]["reasons"]),
        "",
        f"{'':26}{'steps/s':>9}{'least':>9}{'most':>9}{'CPU s/step':>12}{'GiB':>7}{'wait':>7}",
    ]
    lines += [_line(name, one) for name, one in found["candidates"].items()]
    if "ratio" in found:
        lines.append(f"bgray / plainest: {ratio_text(found['ratio'])}")
    else:
        lines.append(f"no plainest loop: {found['failed']}")
    if "ray_ratio" in found:
        lines.append("bare: bgray's loop over batches that it has in memory")
        lines.append(f"on Ray / bare: {ratio_text(found['ray_ratio'])}")
    if found["choices"]:
        lines += ["", "each choice alone the other way, against bgray:"]
        for name, one in found["choices"].items():
            if "error" in one:
                lines.append(f"{name:26} failed: {one['error']}")
            else:
                lines += [_line(name, one), f"{'':26} {ratio_text(one['ratio'])}"]
    lines += [*_split_lines(found), *_floor_lines(found), *_profile_lines(found), ""]
    told = found["prediction"]
    lines.append(
        f"10,000 steps: {told['minutes_to_10k']:.2f} minutes, "
        f"{told['minutes_to_10k_without_wait']:.2f} without waiting for data"
    )
    lines.append(
        f"{told['segments_per_second']:.4g} segments/s x {told['cpu_ms_per_segment']:.2f} ms CPU = "
        f"{told['cores_per_gpu']:.3g} cores to feed it"
    )
    return "\n".join(lines)


def gib_of(one: dict[str, Any]) -> float:
    """Peak of VRAM where there is some, of resident memory elsewhere."""
    return one["rss_peak_gib"] if one["vram_peak_gib"] is None else one["vram_peak_gib"]


def _line(name: str, one: dict[str, Any]) -> str:
    speed, cpu = one["steps_per_second"], one["cpu_seconds_per_step"]["median"]
    return (
        f"{name:26}{speed['median']:9.3f}{speed['least']:9.3f}{speed['most']:9.3f}{cpu:12.4f}"
        f"{gib_of(one):7.2f}{one['data_wait_share']:7.1%}"
    )


def ratio_text(ratio: dict[str, Any]) -> str:
    pairs = ", ".join(f"{value:.3f}" for value in ratio["rounds"])
    text = (
        f"{ratio['median']:.3f} times (round by round: {pairs}); by CPU time {ratio['by_cpu']:.3f}"
    )
    return text + ("" if ratio["clear"] else "; the rounds overlap: no clear difference")


def _split_lines(found: dict[str, Any]) -> list[str]:
    if "split" not in found:
        return []
    whole = 1 / found["candidates"]["bgray"]["steps_per_second"]["median"]
    total = sum(found["split"].values())
    rows = [
        f"  {part:12}{1000 * seconds:10.2f} ms{seconds / total:8.1%}"
        for part, seconds in found["split"].items()
    ]
    return [
        "",
        f"a step in parts, mean of {found['split_steps']} (synchronised at each border and without "
        "CUDA graph, which makes the sum longer):",
        *rows,
        f"  {'sum':12}{1000 * total:10.2f} ms; the step as it is, above: {1000 * whole:.2f} ms",
    ]


def _floor_lines(found: dict[str, Any]) -> list[str]:
    if "floor" not in found:
        return []
    floor = found["floor"]
    matrix = sum(floor["matrix"].values())
    work = (
        f"a step computes {matrix / 1e9:.1f} GFLOP in products and {floor['vector'] / 1e9:.1f} in "
        f"others, keeps {floor['saved'] / GIB:.2f} GiB for the backward pass, has "
        f"{floor['parameters'] / 2**20:.0f} MiB of weights and {floor['state'] / 2**20:.0f} MiB of "
        "optimizer state"
    )
    if floor["peak"] is None:
        return ["", work, f"no floor: the peaks of {found['device']} are not in bgray/devices.py"]
    peak = floor["peak"]
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in peak["tflops"].items())
    return [
        "",
        work,
        f"{peak['name']}: {rates} TFLOP/s, {peak['gb_per_second']:.4g} GB/s ({peak['source']})",
        f"floor: {1000 * floor['compute']:.2f} ms of computing, {1000 * floor['memory']:.2f} ms of "
        f"moving bytes; the step is at {floor['share']:.1%} of what the longer one allows",
    ]


def _profile_lines(found: dict[str, Any]) -> list[str]:
    if "profile" not in found:
        return []
    seen = found["profile"]
    rows = [
        f"  {row['ms']:10.3f} ms{row['calls']:9.1f} x  {row['name'][:80]}" for row in seen["top"]
    ]
    syncs = ", ".join(f"{name} {count:g}" for name, count in seen["syncs"].items())
    reads = ", ".join(f"{name} {count:g}" for name, count in seen["reads"].items())
    total = sum(seen["syncs"].values())
    ends = f"host syncs in a step: {total:g} ({syncs}; {reads})"
    if seen["on"] == "CPU":
        ends += "; on a CPU a read waits for nothing"
    return [
        "",
        f"operators by their own {seen['on']} time in a step ({seen['ms']:.1f} ms in all, "
        f"{seen['launches']:g} launches):",
        *rows,
        ends,
    ]
