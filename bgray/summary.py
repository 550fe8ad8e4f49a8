"""The tables of a sweep: what would run, how long it would take without a GPU, and how it ended."""

import math
import time
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from bgray.build import build_loss, build_model, build_task, meta_model, parameter_count
from bgray.config import Experiment, Sweep
from bgray.console import MARKS, Board, duration, time_to_10k
from bgray.loop import split_extras
from bgray.records import read_info
from bgray.search import Trial


def print_dry(sweep: Sweep, trials: list[Trial]) -> None:
    """Every trial: id, what differs, parameters, steps, and whether it has been run."""
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
            escape(trial.label),
            parameter_count(trial.experiment),
            str(trial.experiment.train.steps),
            state,
        )
    console = Board(name, [], sweep.metric).console
    console.print(table)
    console.print(f"results would be in {trials[0].url.rsplit('/', 1)[0]}", soft_wrap=True)


def forecast(
    sweep: Sweep,
    trials: list[Trial],
    threads: int,
    concurrency: int,
    console: Any,
    patience_seconds: float = 1200,
) -> None:
    """On a CPU: time one example through the first trial's net, and say how long all would take
    when that is longer than `patience_seconds`, with the --set that makes it short."""
    experiment = trials[0].experiment
    torch.set_num_threads(threads)
    seconds = seconds_per_example(experiment)
    step = seconds * experiment.train.batch_size / experiment.runtime.workers
    whole = sum(trial.experiment.train.steps for trial in trials) * step / concurrency
    if whole < patience_seconds:
        return
    changes = shorter(sweep, experiment)
    scale = changes.get("data.segment", experiment.data.segment) / experiment.data.segment
    steps = changes["train.steps"] * len(trials)
    short = steps * seconds * scale * changes["train.batch_size"] / concurrency
    sets = " ".join(f"--set {key}={'null' if v is None else v}" for key, v in changes.items())
    console.print(
        f"No GPU here: about {duration(step)} a step, so about {duration(whole)} for these "
        f"{len(trials)} trials (a guess from one example; validation comes on top).\n"
        f"To try it out in about {duration(short)}: {sets}",
        highlight=False,
        soft_wrap=True,
    )


def seconds_per_example(experiment: Experiment) -> float:
    """Forward, loss and backward of one training example; the best of a few, the first warms up."""
    model, loss = build_model(experiment), build_loss(experiment, rehearsal=True)
    seconds, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < 2 and seconds > 0.05:
        start = time.perf_counter()
        noise = 0.1 * torch.randn(1, experiment.data.channels, experiment.data.segment)
        estimate, extras = split_extras(model(noise))
        loss(estimate, torch.zeros_like(estimate), extras)[0].backward()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def shorter(sweep: Sweep, experiment: Experiment) -> dict[str, Any]:
    """Overrides that make a full-size sweep a matter of minutes on a CPU, and still valid."""
    workers = experiment.runtime.workers
    changes: dict[str, Any] = {
        "train.steps": 100,
        "train.batch_size": workers * max(1, 4 // workers),
        "validation.every": 50,
        "validation.items": 8,
    }
    if sweep.asha:
        changes["asha"] = None  # its rungs lie beyond so few steps
    if experiment.schedule.options.get("warmup_steps", 0) >= 100:
        changes["schedule.warmup_steps"] = 0
    multiple = getattr(meta_model(experiment), "length_multiple", 1)
    segment = -(-8192 // multiple) * multiple
    if segment < experiment.data.segment:
        changes["data.segment"] = segment
    return changes


def close(sweep: Sweep, trials: list[Trial], board: Board, folder: str) -> None:
    """The closing table: best first, at each trial's last step, with the unprocessed input as
    baseline."""
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
            escape(row.label),
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
            + escape(f": {row.info['reason']}" if row.info.get("reason") else ""),
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
