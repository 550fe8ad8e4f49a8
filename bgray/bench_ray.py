"""What sharing costs and brings: a Tune trial against --local, and trials that share a GPU against
one alone."""

import contextlib
import dataclasses
import io
import multiprocessing
import statistics
import tempfile
from typing import Any

from bgray.config import ConfigError, Experiment


def ray_text(result: dict[str, Any]) -> str:
    lines = []
    for name in ("local", "ray"):
        speeds = ", ".join(f"{speed:.2f}" for speed in result[name])
        lines.append(f"{name:5}: median {statistics.median(result[name]):.2f} steps/s ({speeds})")
    pairs = ", ".join(f"{ratio:.3f}" for ratio in result["ratios"])
    lines.append(f"Tune trial / --local: median {result['ratio']:.3f} (pair by pair: {pairs})")
    return "\n".join(lines)


def pack_text(result: dict[str, Any]) -> str:
    k, alone = result["at_a_time"], statistics.median(result["alone"])
    lines = [
        f"{result['gpu']}: a trial holds {result['vram_gib']:.2f} GiB and "
        f"{result['overhead_gib']:.2f} GiB beside; {k} at a time, {result['gib']:.2f} GiB each",
        f"one after another: median {alone:.2f} steps/s",
    ]
    for trials in result["packed"]:
        speeds = ", ".join(f"{speed:.2f}" for speed in trials)
        lines.append(f"{k} at a time: {sum(trials):.2f} steps/s in all ({speeds})")
    pairs = ", ".join(f"{ratio:.3f}" for ratio in result["ratios"])
    median = f"median {result['ratio']:.3f}"
    lines.append(f"at a time / one after another: {median} (pair by pair: {pairs})")
    return "\n".join(lines)


def ray_overhead(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """Steady steps per second (warm-up and validation left out), each round in fresh folders.

    Both run alone, with the same number of torch threads and the same feed in the same process.
    """
    from bgray.experiment import data_hash, prepare_data, run_url
    from bgray.records import read_info
    from bgray.search import make_trial
    from bgray.sweep import run_sweep
    from bgray.train import train_local

    prepare_data(experiment)
    sweep = _sweep_of(experiment)
    speeds: dict[str, list[float]] = {"local": [], "ray": []}
    for _ in range(rounds):
        for where, found in speeds.items():
            with tempfile.TemporaryDirectory() as folder:
                runtime = dataclasses.replace(experiment.runtime, results=folder, threads=1)
                one = dataclasses.replace(experiment, runtime=runtime)
                with contextlib.redirect_stdout(io.StringIO()):
                    if where == "local":
                        train_local(one)
                    else:
                        run_sweep(sweep, [make_trial("base", one, data_hash(one))])
                info = read_info(run_url(one)) or {}
                found.append(info["timing"]["steps_per_second"])
    ratios = [b / a for a, b in zip(speeds["local"], speeds["ray"], strict=True)]
    return {**speeds, "ratios": ratios, "ratio": statistics.median(ratios)}


def _sweep_of(experiment: Experiment):
    from bgray.build import build_task
    from bgray.sweep_config import Sweep

    metric, mode = next(iter(build_task(experiment).scores.items()))
    return Sweep(base={}, metric=metric, mode=mode)


# --- trials that share a GPU


def packed(experiment: Experiment, rounds: int, seconds: float, most: int) -> dict[str, Any]:
    """Steps per second of one trial alone and of as many as fit, `rounds` times in turn, each timed
    for `seconds`. ConfigError where there is no GPU, or only one fits."""
    import torch

    from bgray.packing import Packer

    if not torch.cuda.is_available():
        text = "pack measures trials that share a GPU, and there is none here"
        raise ConfigError("bench pack", [("", text)])
    with tempfile.TemporaryDirectory() as folder:
        packer = Packer(folder)
        found = _probe(experiment)
        if found["out_of_memory"]:
            raise ConfigError("bench pack", [("", "one trial alone is too much for this GPU")])
        packer.learn_probe("one", found)
        share = packer.share("one")
    at_a_time = min(most, int(1 / share.fraction + 1e-9))
    if at_a_time < 2:
        raise ConfigError("bench pack", [("", f"nothing to compare: {share.why}")])
    result: dict[str, Any] = {
        "gpu": found["gpu"],
        "vram_gib": found["vram_gib"],
        "overhead_gib": found["overhead_gib"],
        "gib": share.gib,
        "at_a_time": at_a_time,
        "alone": [],
        "packed": [],
    }
    for _ in range(rounds):
        result["alone"] += _together(experiment, 1, None, seconds)
        result["packed"].append(_together(experiment, at_a_time, share.limit_gib, seconds))
    pairs = zip(result["alone"], result["packed"], strict=True)
    result["ratios"] = [sum(trials) / alone for alone, trials in pairs]
    return {**result, "ratio": statistics.median(result["ratios"])}


def _together(
    experiment: Experiment,
    number: int,
    limit_gib: float | None,
    seconds: float,
    device: str = "cuda",
) -> list[float]:
    """Steps per second of so many trials at a time, each in a process of its own, timed from when
    the last one has warmed up."""
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(number), spawn.Queue()
    jobs = [
        spawn.Process(
            target=_one_of_several,
            args=(experiment, limit_gib, seconds, device, barrier, answers),
        )
        for _ in range(number)
    ]
    for job in jobs:
        job.start()
    try:
        found = [answers.get(timeout=seconds + 600) for _ in jobs]
    finally:
        for job in jobs:
            job.join(30)
            job.kill()
    if texts := [text for text in found if isinstance(text, str)]:
        raise ConfigError("bench pack", [("", texts[0])])
    return found


def _one_of_several(
    experiment: Experiment,
    limit_gib: float | None,
    seconds: float,
    device: str,
    barrier: Any,
    answers: Any,
) -> None:
    import threading

    from bgray.context import Context, pick_device
    from bgray.rehearsal import rehearse

    try:
        context = Context(device=pick_device(device), vram_gib=limit_gib)
        cost = rehearse(
            experiment,
            context,
            steps=2**40,
            each=experiment.runtime.log_every,
            seconds=seconds,
            ready=lambda: barrier.wait(600),
            whole=False,
        )
        answers.put(1 / statistics.mean(cost.step_seconds))
    except threading.BrokenBarrierError:
        answers.put("another trial failed before all had warmed up")
    except Exception as error:
        barrier.abort()
        answers.put(f"{type(error).__name__}: {error}")


def _probe(experiment: Experiment) -> dict[str, Any]:
    """In a fresh process, so that nothing of it stays on the GPU."""
    from concurrent.futures import ProcessPoolExecutor

    from bgray.packing import probe

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(probe, experiment).result()
