"""What a sweep would take: trials, steps, hours, memory and storage, from a short probe on this
machine, and how sure that is."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from bgray import rungs
from bgray.agenda import Agenda
from bgray.build import parameter_count, short_segment
from bgray.cautions import cautions
from bgray.config import Experiment
from bgray.console import Board, duration
from bgray.context import Context, pick_device
from bgray.costs import SECONDS, Kind, Range, measure
from bgray.packing import Peak, share_of
from bgray.probes import GIB
from bgray.records import read_info
from bgray.rehearsal import cost_key, rehearse
from bgray.resources import CONTEXT_GIB, Plan, Share, this_machine
from bgray.search import Trial
from bgray.sweep_config import Sweep


@dataclass(frozen=True)
class Run:
    """One planned run."""

    label: str
    experiment: Experiment
    steps: int
    """At most, of those still to do."""
    expected: float
    """As far as it probably comes."""


@dataclass(frozen=True)
class Forecast:
    """What the runs take; ranges are the spread of what was measured, not all that may happen."""

    trials: int
    steps: int
    """At most."""
    expected_steps: float
    hours: Range
    """Of the clock, for the expected steps."""
    longest_hours: Range
    """Of the clock, if every run goes to its end."""
    device_hours: Range
    """GPU-hours; on a CPU, hours of trials."""
    run_hours: tuple[float, ...]
    """Device-hours of each run, in their order."""
    storage_gib: float
    memory_gib: float | None
    """Peak of the largest trial: of VRAM with the CUDA context, or resident on a CPU; None: not
    measured."""
    device: str
    kinds: tuple[Kind, ...]
    notes: tuple[str, ...]
    """How sure this is, and what is not in it."""

    def lines(self) -> list[str]:
        gpu = self.device != "cpu"
        steps = f"steps    {self.steps:,}"
        if round(self.expected_steps) < self.steps:
            steps += f" at most, about {self.expected_steps:,.0f} as rungs stop some"
        time = f"time     {self.hours.text(_hours)}"
        if round(self.expected_steps) < self.steps:
            time += f"; {_hours(self.longest_hours.middle)} if none is stopped"
        time += f"; {self.device_hours.text(_number)} {'GPU' if gpu else 'trial'}-hours"
        memory = "not measured" if self.memory_gib is None else f"{self.memory_gib:.2g} GiB "
        if self.memory_gib is not None:
            memory += "of VRAM the largest" if gpu else "resident the largest; VRAM: no GPU here"
        return [
            f"trials   {self.trials}",
            steps,
            time,
            f"memory   {memory}",
            f"storage  up to {self.storage_gib:.2g} GiB",
            *(f"{'' if number else 'how sure':9}{note}" for number, note in enumerate(self.notes)),
        ]


def _hours(hours: float) -> str:
    return duration(3600 * hours)


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


# --- the sum


def forecast(runs: Sequence[Run], *, seconds: float = SECONDS) -> Forecast:
    """What `runs` take on this machine, after a probe of about `seconds`."""
    first = runs[0].experiment
    here = torch.cuda.is_available() and first.runtime.device != "cpu"
    device = pick_device("auto" if here else "cpu")
    # What asks for a GPU that is not here is measured on the CPU, and said to be.
    runtime = dataclasses.replace(first.runtime, device="auto" if here else "cpu")
    local = dataclasses.replace(first, runtime=runtime)
    nodes = this_machine(torch.cuda.device_count() if here else 0)
    plan = Plan.make(local, len(runs), nodes)
    kinds = measure(
        [(run.label, run.experiment) for run in runs],
        threads=plan.threads,
        device=device,
        seconds=seconds,
    )
    known = [(run, kinds[cost_key(run.experiment)]) for run in runs]
    shares = _shares([kind for _, kind in known], local) if here else []
    if shares:
        plan = Plan.make(local, len(runs), nodes, shares)
    held = [share.fraction for share in shares] or [first.runtime.workers] * len(runs)
    expected = [kind.seconds(run.experiment, run.expected) for run, kind in known]
    longest = [kind.seconds(run.experiment, run.steps) for run, kind in known]
    device_seconds = [part.times(each) for part, each in zip(expected, held, strict=True)]
    return Forecast(
        trials=len(runs),
        steps=sum(run.steps for run in runs),
        expected_steps=sum(run.expected for run in runs),
        hours=_clock(expected, plan.concurrency).times(1 / 3600),
        longest_hours=_clock(longest, plan.concurrency).times(1 / 3600),
        device_hours=Range.total(device_seconds).times(1 / 3600),
        run_hours=tuple(part.middle / 3600 for part in device_seconds),
        storage_gib=sum(kind.bytes(run.experiment, run.expected) for run, kind in known) / GIB,
        memory_gib=_memory(list(kinds.values())),
        device=kinds[cost_key(first)].cost.device,
        kinds=tuple(kinds.values()),
        notes=tuple(_notes(list(kinds.values()), plan, first, here)),
    )


def _shares(kinds: list[Kind], experiment: Experiment) -> list[Share]:
    """Of a GPU, of each run; none where runs do not share one."""
    vram = experiment.runtime.vram
    if vram == "whole" or experiment.runtime.workers > 1:
        return []
    peaks = [
        Peak(kind.cost.vram_gib, "probe", kind.cost.overhead_gib or CONTEXT_GIB)
        if kind.whole and kind.cost.vram_gib is not None
        else None
        for kind in kinds
    ]
    return [share_of(peak, kinds[0].cost.gpu_gib, vram) for peak in peaks]


def _clock(parts: list[Range], concurrency: int) -> Range:
    """Of so many at a time, without gaps; never less than the longest one."""
    whole = Range.total(parts).times(1 / concurrency)
    longest = max(parts, key=lambda part: part.middle)
    pairs = zip(dataclasses.astuple(whole), dataclasses.astuple(longest), strict=True)
    return Range(*(max(pair) for pair in pairs))


def _memory(kinds: list[Kind]) -> float | None:
    if not all(kind.whole for kind in kinds):
        return None
    costs = [kind.cost for kind in kinds]
    return max((c.vram_gib + (c.overhead_gib or 0)) if c.vram_gib else c.rss_gib for c in costs)


def _notes(kinds: list[Kind], plan: Plan, first: Experiment, here: bool) -> list[str]:
    measured = [kind for kind in kinds if not kind.sure.startswith("scaled")]
    spread = max(kind.step_seconds.high / kind.step_seconds.low for kind in measured)
    device = measured[0].cost.device
    place = f"this machine's CPU ({plan.threads} torch threads)" if device == "cpu" else device
    fewest = min(measured, key=lambda kind: len(kind.cost.step_seconds))
    notes = [
        f"{len(measured)} of {len(kinds)} kinds of trial measured on {place}, on made-up data, "
        f"{fewest.sure} or more each: from fast to slow steps a factor of {spread:.2g}"
    ]
    if not all(kind.whole for kind in measured):
        notes.append(
            "batches were measured in part, and a full one is cheaper per example: rather less"
        )
    if len(measured) < len(kinds):
        notes.append("the other kinds are scaled by parameters x samples: a guess")
    if not here and first.runtime.device != "cpu":
        notes.append("no GPU here: with one, hours are far fewer, and of VRAM nothing is known yet")
    if os.environ.get("RAY_ADDRESS"):
        notes.append("the cluster's machines were not asked: hours are those of this one alone")
    missing = ["waiting for data", "the start of Ray and of each process"]
    if plan.concurrency > 1:
        missing.append(f"how much {plan.concurrency} trials at a time slow each other")
    return [*notes, f"not in it: {', '.join(missing)}"]


def halved(steps: int, rungs: Sequence[int], factor: int, exempt: float = 0.0) -> float:
    """Mean steps of a run where one in `factor` goes on at each rung, and a share `exempt` always
    does (Li et al. 2020, arXiv:1810.05934, algorithm 2, without its early guesses)."""
    ends = [*(rung for rung in rungs if rung < steps), steps]
    left, before, mean = 1.0, 0, 0.0
    for end in ends:
        mean += left * (end - before)
        left, before = left / factor, end
    return exempt * steps + (1 - exempt) * mean


def fits(budget_hours: float, run_hours: Sequence[float], spent_hours: float = 0.0) -> int:
    """How many of the runs, the first ones first, end within the budget; all in device-hours."""
    for number, hours in enumerate(run_hours):
        spent_hours += hours
        if spent_hours > budget_hours * (1 + 1e-9):
            return number
    return len(run_hours)


# --- of a sweep


def planned(agenda: Agenda) -> list[Run]:
    """The runs that are still to do, as far as rungs let them come; of a screening the second
    round, too, as if the shortlist were the first variants; draws to come as if each were the
    base."""
    sweep, variants = agenda.sweep, list(agenda.variants.values())
    settled: set[str] = set()
    if sweep.asha:
        settled = rungs.settled(agenda.field(), sweep.asha.reduction_factor)
        exempt = min(1.0, 1 / len(variants) + sweep.asha.controls)
    runs = []
    for trial in agenda.trials.values():
        known, steps = agenda.known[trial.id], trial.experiment.train.steps
        ended = known.final or known.state == "diverged" or trial.variant in settled
        left = 0 if ended else max(0, steps - known.step)
        expected = float(left)
        if sweep.asha and left:
            mean = halved(steps, agenda.rungs, sweep.asha.reduction_factor, exempt)
            expected = min(expected, mean)
        if left:
            runs.append(Run(trial.label, trial.experiment, left, expected))
    more = [variants[0]] * (agenda.draws.left * sweep.seeds) if agenda.draws else []
    if sweep.screening and agenda.to_choose:
        more += variants[: sweep.screening.shortlist + 1] * sweep.screening.seeds
    for trial in more:
        steps = trial.experiment.train.steps
        runs.append(Run(trial.label, trial.experiment, steps, float(steps)))
    return runs


def print_dry(agenda: Agenda, seconds: float = SECONDS) -> None:
    """Every trial: id, what differs, parameters, steps, whether it has been run; then what all
    that are left would take. Starts nothing."""
    sweep, trials = agenda.sweep, list(agenda.trials.values())
    name = trials[0].experiment.name
    console = Board(name, [], sweep.metric).console
    console.print(listing(name, trials))
    if agenda.draws and agenda.draws.left:
        console.print(f"and {agenda.draws.left} draws to come, each chosen by what is known then")
    console.print(f"results would be in {agenda.folder}", soft_wrap=True)
    for text in cautions(sweep, trials):
        console.print(f"Careful: {text}", highlight=False, markup=False, soft_wrap=True)
    runs = planned(agenda)
    if not runs:
        console.print("There is nothing left to do.")
        return
    found = forecast(runs, seconds=seconds)
    lines = found.lines()
    if sweep.budget:
        spent = agenda.hours()
        number = fits(sweep.budget.gpu_hours, found.run_hours, spent)
        text = f"budget   {sweep.budget.gpu_hours:g} hours, {spent:.3g} of them spent: "
        lines.insert(3, f"{text}about {number} of {len(runs)} runs")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def listing(name: str, trials: Sequence[Trial]) -> Table:
    """One row per trial."""
    table = Table(title=f"{name}: {len(trials)} trials", title_justify="left")
    for column in ("id", "what differs"):
        table.add_column(column, overflow="fold")
    for column in ("seed", "parameters", "steps", "state"):
        table.add_column(column, justify="right")
    counts: dict[str, str] = {}
    for trial in trials:
        if trial.variant not in counts:
            counts[trial.variant] = parameter_count(trial.experiment)
        state = (read_info(trial.url) or {}).get("state", "new")
        steps, seed = str(trial.experiment.train.steps), str(trial.seed)
        count = counts[trial.variant]
        table.add_row(trial.id, escape(trial.label), seed, count, steps, state)
    return table


# --- before a run without a GPU


def warn_if_long(
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
    context = Context(threads=threads)
    one = rehearse(experiment, context, batch=1, warm_up=1, steps=20, seconds=1.0, whole=False)
    seconds = min(one.step_seconds)
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
        f"{len(trials)} trials (a guess from one example; validation comes on top; --dry measures "
        f"more).\nTo try it out in about {duration(short)}: {sets}",
        highlight=False,
        soft_wrap=True,
    )


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
    if sweep.pbt:
        changes["pbt.every"] = changes["validation.every"]
    if experiment.schedule.options.get("warmup_steps", 0) >= 100:
        changes["schedule.warmup_steps"] = 0
    segment = short_segment(experiment)
    if segment < experiment.data.segment:
        changes["data.segment"] = segment
    return changes
