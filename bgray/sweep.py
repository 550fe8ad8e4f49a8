"""Sweep: many experiments on Ray Tune with ASHA; run it again and it goes on where it was.

python -m bgray.sweep SWEEP.yaml [--dry] [--set path.to.key=value ...]
"""

import argparse
import copy
import dataclasses
import itertools
import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from bgray import storage
from bgray.config import ConfigError, Experiment, Sweep, read, set_path, split_sweep
from bgray.train import (
    absolute,
    ctrl_c_asks_first,
    errors_in_one_line,
    fit_workers,
    ray_storage,
    stop_asked,
)


@dataclass(frozen=True)
class Trial:
    """One resolved experiment of a sweep."""

    id: str
    label: str
    """What differs from the base."""
    experiment: Experiment
    url: str


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("sweep", help="YAML file: an experiment, and what varies")
    parser.add_argument(
        "--dry", action="store_true", help="resolve and list every trial, start nothing"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. train.steps=100",
    )
    args = parser.parse_args(argv)
    with errors_in_one_line():
        sweep, trials = expand(args.sweep, tuple(args.set))
        if args.dry:
            print_dry(sweep, trials)
        else:
            sys.exit(run_sweep(sweep, trials))


# --- which trials


def expand(source: str, overrides: tuple[str, ...] = ()) -> tuple[Sweep, list[Trial]]:
    """Every trial of a sweep file, fully checked before anything starts; ConfigError names the
    trial it is about."""
    from bgray.experiment import resolve, run_url

    sweep = split_sweep(read(source, overrides), source)
    trials: dict[str, Trial] = {}
    for label, changes in combinations(sweep, source):
        raw = copy.deepcopy(sweep.base)
        for path, value in changes.items():
            set_path(raw, path, copy.deepcopy(value))
        experiment = absolute(resolve(raw, f"{source} [{label}]" if changes else source))
        url = run_url(experiment)
        trial = Trial(url.rsplit("/", 1)[-1], label, experiment, url)
        if trial.id in trials:  # the same experiment by another path: once is enough
            trial = dataclasses.replace(
                trials[trial.id], label=f"{trials[trial.id].label} = {label}"
            )
        trials[trial.id] = trial
    _check_asha(sweep, list(trials.values()), source)
    return sweep, list(trials.values())


def combinations(sweep: Sweep, source: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, {dotted path: value}) of each trial: variants x grid x random draws; one empty block
    for no search."""
    rng = np.random.default_rng(sweep.sample_seed)
    grids: dict[str, list[Any]] = {}
    draws: dict[str, Any] = {}
    problems = []
    for path, spec in sweep.search.items():
        try:
            kind, values = ("grid", spec) if isinstance(spec, list) else next(iter(spec.items()))
            if isinstance(spec, dict) and len(spec) != 1:
                raise ValueError(f"expected one of {', '.join(DRAWS)} or grid, got {sorted(spec)}")
            if not isinstance(values, list) or not values:
                raise ValueError(f"expected a list with values after '{kind}', got {values!r}")
            if kind == "grid":
                grids[path] = values
            else:
                draws[path] = _drawer(kind, values)
        except (ValueError, StopIteration) as error:
            problems.append((f"search.{path}", str(error) or "is empty"))
    if problems:
        raise ConfigError(source, problems)
    found = []
    for name, block in (sweep.variants or {"": {}}).items():
        for cell in itertools.product(*grids.values()):
            for _ in range(sweep.samples if draws else 1):
                drawn = {path: draw(rng) for path, draw in draws.items()}
                searched = {**dict(zip(grids, cell, strict=True)), **drawn}
                label = " ".join(
                    filter(None, [name, *(f"{_short(p)}={_text(v)}" for p, v in searched.items())])
                )
                found.append((label or "base", {**block, **searched}))
    return found


def _drawer(kind: str, values: list[Any]):
    if kind not in DRAWS:
        raise ValueError(f"unknown kind '{kind}'; there is grid, {', '.join(DRAWS)}")
    if kind == "choice":
        return lambda rng: values[int(rng.integers(len(values)))]
    if len(values) != 2 or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(
            f"expected two numbers [low, high], got {values!r} (write 1.0e-4: YAML reads 1e-4 "
            "as text)"
        )
    low, high = values
    if low >= high or (kind == "loguniform" and low <= 0):
        raise ValueError(
            f"expected {'0 < ' if kind == 'loguniform' else ''}low < high, got {values!r}"
        )
    return lambda rng: DRAWS[kind](rng, low, high)


DRAWS = {
    "choice": None,
    "uniform": lambda rng, low, high: float(f"{rng.uniform(low, high):.6g}"),
    "loguniform": lambda rng, low, high: float(
        f"{math.exp(rng.uniform(math.log(low), math.log(high))):.6g}"
    ),
    "randint": lambda rng, low, high: int(rng.integers(low, high)),
}
"""Kinds of random entries; numbers are rounded to six digits so that what is written is what
ran."""


def _short(path: str) -> str:
    return path.removeprefix("model.").removeprefix("train.")


def _text(value: Any) -> str:
    return (
        json.dumps(value, separators=(",", ":")) if isinstance(value, list | dict) else str(value)
    )


def _check_asha(sweep: Sweep, trials: list[Trial], source: str) -> None:
    from bgray.experiment import build_task

    problems = []
    scores = build_task(trials[0].experiment).scores
    if sweep.metric not in scores:
        problems.append(
            ("metric", f"'{sweep.metric}' is not scored by this task; there is {', '.join(scores)}")
        )
    elif scores[sweep.metric] != sweep.mode:
        problems.append(
            (
                "mode",
                f"{sweep.metric} is better when {scores[sweep.metric]}imal: write mode: "
                f"{scores[sweep.metric]}",
            )
        )
    if sweep.asha:
        longest = max(trial.experiment.train.steps for trial in trials)
        if sweep.asha.grace_steps >= longest:
            problems.append(
                (
                    "asha.grace_steps",
                    f"{sweep.asha.grace_steps} is not below train.steps = {longest}: nothing "
                    "would be stopped",
                )
            )
        for trial in trials:
            if trial.experiment.validation.every > sweep.asha.grace_steps:
                problems.append(
                    (
                        "validation.every",
                        f"{trial.experiment.validation.every} is above asha.grace_steps = "
                        f"{sweep.asha.grace_steps}: no score at the first rung",
                    )
                )
    if problems:
        raise ConfigError(source, list(dict.fromkeys(problems)))


# --- dry


def print_dry(sweep: Sweep, trials: list[Trial]) -> None:
    """Every trial: id, what differs, parameters, steps, and whether it has been run."""
    from rich.table import Table

    from bgray.console import Board
    from bgray.experiment import parameter_count
    from bgray.records import read_info

    name = trials[0].experiment.name
    table = Table(title=f"{name}: {len(trials)} trials", title_justify="left")
    for column in ("id", "what differs"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "steps", "state"):
        table.add_column(column, justify="right")
    for trial in trials:
        state = (read_info(trial.url) or {}).get("state", "new")
        table.add_row(
            trial.id,
            trial.label,
            parameter_count(trial.experiment),
            str(trial.experiment.train.steps),
            state,
        )
    console = Board(name, [], sweep.metric).console
    console.print(table)
    console.print(f"results would be in {trials[0].url.rsplit('/', 1)[0]}", soft_wrap=True)


# --- run


def run_sweep(sweep: Sweep, trials: list[Trial]) -> int:
    """Run what is not done yet, print the table; exit code 1 when a trial failed."""
    from bgray.cluster import ray_session
    from bgray.console import Board, Row, bar
    from bgray.experiment import prepare_data
    from bgray.records import ENDED

    folder = trials[0].url.rsplit("/", 1)[0]
    rows = [Row(t.id, t.label, t.url, t.experiment.train.steps) for t in trials]
    board = Board(trials[0].experiment.name, rows, sweep.metric)
    for row in rows:
        row.refresh()
    waiting = [row for row in rows if row.state not in ENDED]
    if waiting:
        if len(waiting) < len(rows):
            board.console.print(
                f"{len(rows) - len(waiting)} of {len(rows)} trials are done already; going on "
                "with the rest"
            )
        with ray_session(dashboard=any(_nested(t) for t in trials)) as ray:
            for trial in _first_of_each_data(trials):
                with bar(board.console, "preparing data") as progress:
                    prepare_data(trial.experiment, workers=None, progress=progress)
            plan = Plan.make(trials, ray.cluster_resources())
            board.console.print(plan.text)
            if not plan.gpus:
                forecast(trials, plan, board.console)
            with board.live():
                _tune(sweep, trials, plan, folder)
    close(sweep, trials, board, folder)
    return 1 if any(row.state == "failed" for row in rows) else 0


def _nested(trial: Trial) -> bool:
    """More than one worker: Tune drives a TorchTrainer; otherwise the Tune trial is itself the
    worker."""
    return trial.experiment.runtime.workers > 1


def _first_of_each_data(trials: list[Trial]) -> list[Trial]:
    from bgray.experiment import data_hash

    return list({data_hash(trial.experiment): trial for trial in reversed(trials)}.values())


@dataclass(frozen=True)
class Plan:
    """How many trials at a time, and what each gets."""

    concurrency: int
    cpus: float
    """Per training worker."""
    gpus: float
    threads: int
    text: str

    @staticmethod
    def make(trials: list[Trial], resources: dict[str, float]) -> "Plan":
        runtime = trials[0].experiment.runtime
        cpus, gpus = (
            resources.get("CPU", 1),
            0 if runtime.device == "cpu" else resources.get("GPU", 0),
        )
        workers = runtime.workers
        if gpus:
            fit = max(1, int(gpus / (runtime.gpus * workers)))
            limit = f"{gpus:g} GPUs, {runtime.gpus * workers:g} a trial"
        else:
            fit = max(1, int(cpus) // workers)
            limit = f"{cpus:g} CPUs, no GPU"
        concurrency = min(runtime.concurrency or fit, len(trials))
        share = cpus / (concurrency * workers)
        # A quarter stays free for Ray Data, which needs a CPU to make any batch at all.
        asked = runtime.cpus or round(max(0.1, 0.75 * share), 2)
        threads = runtime.threads or max(1, int(share))
        return Plan(
            concurrency=concurrency,
            cpus=asked,
            gpus=runtime.gpus if gpus else 0.0,
            threads=threads,
            text=f"{concurrency} of {len(trials)} trials at a time ({limit}); {threads} torch "
            "threads a worker",
        )


def _tune(sweep: Sweep, trials: list[Trial], plan: Plan, folder: str) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from bgray.records import PRUNED, close_from_outside, reason

    # Ours asks the trials to checkpoint first; Tune's stops them where they are.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # our table has the reasons
    stop_url = storage.join(folder, ".ray", f"stop-{int(time.time())}-{os.getpid()}")
    by_id = {trial.id: trial for trial in trials}
    steps = max(trial.experiment.train.steps for trial in trials)
    scheduler: Any = FIFOScheduler()
    if sweep.asha:
        scheduler = ASHAScheduler(
            time_attr="step",
            max_t=steps,
            grace_period=sweep.asha.grace_steps,
            reduction_factor=sweep.asha.reduction_factor,
        )
    nested = any(_nested(trial) for trial in trials)
    trainable = tune.with_parameters(
        drive_workers if nested else tune_trial, trials=by_id, plan=plan, stop_url=stop_url
    )
    # The driver of a nested trial only waits; its workers ask for the resources.
    resources = (
        {"CPU": 0.01} if nested else {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}
    )
    path, filesystem = ray_storage(trials[0].experiment)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"trial": tune.grid_search(list(by_id))},
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            scheduler=scheduler,
            max_concurrent_trials=plan.concurrency,
            # On a GPU a new process per trial: a warm one keeps CUDA memory that is not the
            # trial's own.
            reuse_actors=not plan.gpus and not nested,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    with ctrl_c_asks_first() as asked:
        handler = signal.getsignal(signal.SIGINT)

        def stop(*args: Any) -> None:
            handler(*args)  # type: ignore[operator]
            storage.write_bytes(stop_url, b"")

        signal.signal(signal.SIGINT, stop)
        results = tuner.fit()
    if asked():
        storage.remove(stop_url)
        return
    for result in results:  # a process that was killed could not say how its run ended
        url = by_id[(result.config or {})["trial"]].url
        if result.error is None:
            close_from_outside(url, "stopped", PRUNED)
        else:
            close_from_outside(url, "failed", reason(result.error))


def tune_trial(config: dict[str, Any], trials: dict[str, Trial], plan: Plan, stop_url: str) -> None:
    """A Tune trial that is itself the training worker."""
    from ray import tune

    from bgray.experiment import prepare_data
    from bgray.records import recorded_failure
    from bgray.trial import Context, choose_feed, pick_device, run_trial

    trial, stop = _start(config, trials, stop_url)
    if trial is None:
        return
    experiment = trial.experiment
    feed, data_cpus, reason = choose_feed(experiment)
    with recorded_failure(trial.url):
        run_trial(
            experiment,
            prepare_data(experiment),
            Context(
                device=pick_device(experiment.runtime.device),
                threads=plan.threads,
                feed=feed,
                feed_reason=reason,
                data_cpus=data_cpus,
                report=lambda step, metrics: tune.report(metrics),
                stop=stop,
            ),
        )


def drive_workers(
    config: dict[str, Any], trials: dict[str, Trial], plan: Plan, stop_url: str
) -> None:
    """A Tune trial that runs a TorchTrainer with several workers."""
    from ray.train._internal.session import get_session
    from ray.tune.integration.ray_train import TuneReportCallback

    from bgray.records import recorded_failure

    trial, _ = _start(config, trials, stop_url)
    if trial is None:
        return
    # The thread of a stopped trial lives on for a moment and sees its workers die.
    stopped = get_session().stop_event.is_set
    with recorded_failure(trial.url, stopped):
        fit_workers(
            trial.experiment,
            trial.id,
            cpus=plan.cpus,
            callbacks=(TuneReportCallback(),),
            stop_url=stop_url,
        )


def _start(config: dict[str, Any], trials: dict[str, Trial], stop_url: str):
    """The trial and its question for a stop; None where it has ended before (its rungs are told to
    the scheduler)."""
    from ray import tune

    from bgray.records import ENDED, read_info
    from bgray.trial import evaluations

    trial = trials[config["trial"]]
    stop = stop_asked(stop_url)
    if (read_info(trial.url) or {}).get("state") in ENDED:
        for _, metrics in evaluations(trial.url):
            tune.report(metrics)
        return None, stop
    return (None if stop() else trial), stop


# --- what a full-size sweep costs without a GPU


def forecast(trials: list[Trial], plan: Plan, console: Any, patience_seconds: float = 1200) -> None:
    """On a CPU: time one small step of the first trial and say how long all would take, when that
    is long."""
    import torch

    from bgray.console import duration
    from bgray.experiment import build_loss, build_model

    experiment = trials[0].experiment
    train, segment = experiment.train, experiment.data.segment
    model, loss = build_model(experiment), build_loss(experiment)
    torch.set_num_threads(plan.threads)
    seconds = math.inf
    began = time.perf_counter()
    while (
        time.perf_counter() - began < 2 and seconds > 0.05
    ):  # the best of a few: the first warms up
        start = time.perf_counter()
        noise = 0.1 * torch.randn(1, experiment.data.channels, segment)
        loss(model(noise), noise[:, None])[0].backward()
        seconds = min(seconds, time.perf_counter() - start)
    step = seconds * train.batch_size / experiment.runtime.workers
    whole = sum(t.experiment.train.steps for t in trials) * step / plan.concurrency
    if whole < patience_seconds:
        return
    steps = 100
    batch = max(experiment.runtime.workers, min(train.batch_size, int(0.5 / seconds) or 1))
    batch -= batch % experiment.runtime.workers
    short = " ".join(
        f"--set {key}={value}"
        for key, value in {
            "train.steps": steps,
            "train.batch_size": batch,
            "validation.every": steps // 2,
            "validation.items": 8,
        }.items()
    )
    if trials[0].experiment.schedule.options.get("warmup_steps", 0) >= steps:
        short += " --set schedule.warmup_steps=0"
    short_whole = len(trials) * steps * seconds * batch / plan.concurrency
    console.print(
        f"No GPU here: about {duration(step)} a step, so about {duration(whole)} for these "
        f"{len(trials)} trials "
        f"(a guess from one example; validation comes on top).\nTo try it out in about "
        f"{duration(short_whole)}: {short}",
        highlight=False,
        soft_wrap=True,
    )


# --- the end


def close(sweep: Sweep, trials: list[Trial], board: Any, folder: str) -> None:
    """The closing table: best first, at each trial's last step, with the unprocessed input as
    baseline."""
    from rich.table import Table

    from bgray.console import MARKS, time_to_10k
    from bgray.experiment import build_task, parameter_count

    for row in board.rows:
        row.refresh()
    scores = build_task(trials[0].experiment).scores
    sign = 1 if sweep.mode == "min" else -1
    table = Table(
        title=f"{board.title}: {sweep.metric} at each trial's last step (one seed is an anecdote)",
        title_justify="left",
    )
    for column in ("id", "what differs"):
        table.add_column(column, overflow="fold")
    for column in (*scores, "at step", "parameters", "it/s", "10k steps", "VRAM GiB", "data wait"):
        table.add_column(column, justify="right")
    table.add_column("state")

    def rank(pair: Any) -> tuple[int, float]:
        metrics = pair[0].info.get("metrics", {})
        return (-(metrics.get("step") or 0), sign * metrics.get(sweep.metric, math.inf))

    for row, trial in sorted(zip(board.rows, trials, strict=True), key=rank):
        metrics, timing = row.info.get("metrics", {}), row.info.get("timing") or {}
        vram = timing.get("vram_peak_gib")
        table.add_row(
            row.id,
            row.label,
            *(f"{metrics[name]:.4f}" if name in metrics else "-" for name in scores),
            str(metrics.get("step", "-")),
            parameter_count(trial.experiment),
            f"{timing['steps_per_second']:.3g}" if timing.get("steps_per_second") else "-",
            time_to_10k(timing),
            "CPU" if vram is None else f"{vram:.2f}",
            f"{timing['data_wait_share']:.0%}"
            if timing.get("data_wait_share") is not None
            else "-",
            MARKS.get(row.state, row.state)
            + (f": {row.info['reason']}" if row.info.get("reason") else ""),
        )
    sets = {row.info.get("validation") for row in board.rows if row.info.get("validation")}
    for row in board.rows:
        if row.info.get("baseline"):
            values = [f"{row.info['baseline'][name]:.4f}" for name in scores]
            table.add_row("-", "unprocessed input", *values, *["-"] * 6, "baseline")
            break
    board.console.print(table)
    if len(sets) > 1:
        board.console.print(
            "These trials were validated on different sets (segment, items or data differ): "
            "do not compare them."
        )
    states = {row.state for row in board.rows}
    if states & {"interrupted", "failed", "waiting", "running"}:
        board.console.print("Not all trials are done: the same command goes on with them.")
    board.console.print(f"Metrics, checkpoints and clips: {folder}/<id>/", soft_wrap=True)


if __name__ == "__main__":
    from bgray.sweep import main  # so that Ray pickles bgray.sweep.*, not __main__.*, by reference

    main()
