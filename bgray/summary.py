"""What a sweep says of itself: what has run before; how it ended, and how far to trust that."""

import functools
import math
import shlex
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from bgray import rungs, storage, tensorboard
from bgray.agenda import Agenda
from bgray.build import build_task, parameter_count
from bgray.compare import Comparison, compare_sweep
from bgray.config import ConfigError
from bgray.console import MARKS, Board, Row, time_to_10k
from bgray.known import elsewhere
from bgray.search import Trial

MOST_ROWS = 40
"""Of trials that the console lists one by one."""
LITTLE_TRUST = 0.5


def say_what_is_done(agenda: Agenda, board: Board) -> None:
    """What was run before, with its result: nobody pays twice for one number."""
    say = functools.partial(board.console.print, highlight=False, markup=False, soft_wrap=True)
    done = [(t, k) for t in agenda.trials.values() if (k := agenda.known[t.id]).step > 0]
    if done:
        say(f"{len(done)} of {len(agenda.trials)} trials have run before; going on with the rest:")
    new = [trial for trial in agenda.trials.values() if not agenda.known[trial.id].step]
    others = elsewhere(agenda.folder, new, agenda.sweep)
    for number, (trial, known) in enumerate([*done, *others]):
        if number == MOST_ROWS:
            say(f"  ... and {len(done) + len(others) - MOST_ROWS} more")
            break
        score = known.scores.get(known.step)
        value = "" if score is None else f", {agenda.sweep.metric} {score:.4f}"
        where = f" in {trial.url} (move it here to save the time)" if number >= len(done) else ""
        say(f"  {trial.id} {trial.title}: {known.state} at step {known.step}{value}{where}")


def close(agenda: Agenda, board: Board) -> None:
    """The closing words: every trial, then what can be said of the variants, then how far to trust
    the rungs."""
    for row in board.rows:
        row.refresh()
    say, comparison = board.console.print, None
    say(trials_table(agenda, board))
    sets = {row.info.get("validation") for row in board.rows if row.info.get("validation")}
    if len(sets) > 1:
        say(
            "These trials were validated on different sets (segment, items or data differ): "
            "do not compare them."
        )
    elif len(agenda.variants) > 1 and agenda.population is None:
        try:
            comparison = compare_sweep(agenda.folder)
            say(comparison.table())
        except ConfigError as error:  # too early: nothing has been evaluated yet
            say(str(error), markup=False, highlight=False)
    for text in trust_in_rungs(agenda):
        say(text, highlight=False, markup=False, soft_wrap=True)
    states = {row.state for row in board.rows}
    if states & {"interrupted", "failed", "waiting", "running"} and not agenda.spent():
        say("Not all trials are done: the same command goes on with them.")
    say(f"Metrics, checkpoints and clips: {agenda.folder}/<id>/", soft_wrap=True)
    for text in what_comes_next(agenda, comparison):
        say(text, highlight=False, markup=False, soft_wrap=True)


def trials_table(agenda: Agenda, board: Board) -> Table:
    """One row per trial, by its last step and score there; only those that went wrong where there
    are very many."""
    sweep, trials = agenda.sweep, agenda.trials
    scores = build_task(next(iter(trials.values())).experiment).scores
    sign = 1 if sweep.mode == "min" else -1
    rows = board.rows
    title = f"{board.title}: {sweep.metric} at each trial's last step"
    if len(rows) > MOST_ROWS:
        rows = [row for row in rows if row.state not in ("finished", "stopped", "waiting")]
        title = f"{board.title}: {len(rows)} of {len(board.rows)} trials did not end well"
    table = Table(title=title, title_justify="left")
    for column in ("id", "what differs"):
        table.add_column(column, overflow="fold")
    for column in (*scores, "at step", "parameters", "it/s", "10k steps", "VRAM GiB", "data wait"):
        table.add_column(column, justify="right")
    table.add_column("state")

    def rank(row: Row) -> tuple[int, float]:
        metrics = row.info.get("metrics", {})
        value = metrics.get(sweep.metric, math.nan)
        return (-(metrics.get("step") or 0), math.inf if math.isnan(value) else sign * value)

    for row in sorted(rows, key=rank):
        metrics, timing = row.info.get("metrics", {}), row.info.get("timing") or {}
        vram, wait = timing.get("vram_peak_gib"), timing.get("data_wait_share")
        table.add_row(
            row.id,
            escape(row.label),
            *(f"{metrics[name]:.4f}" if name in metrics else "-" for name in scores),
            str(metrics.get("step", "-")),
            parameter_count(trials[row.id].experiment),
            f"{timing['steps_per_second']:.3g}" if timing.get("steps_per_second") else "-",
            time_to_10k(timing),
            "CPU" if vram is None else f"{vram:.2f}",
            "-" if wait is None else f"{wait:.0%}",
            MARKS.get(row.state, row.state)
            + escape(f": {row.info['reason']}" if row.info.get("reason") else ""),
        )
    for row in board.rows:
        if row.info.get("baseline"):
            known = row.info["baseline"]
            values = [f"{known[name]:.4f}" if name in known else "-" for name in scores]
            table.add_row("-", "unprocessed input", *values, *["-"] * 6, "")
            break
    return table


def trust_in_rungs(agenda: Agenda) -> list[str]:
    """Whether the order at each rung was that of the end, over the variants that nobody stopped."""
    lines = []
    for found in rungs.trust(agenda.field()) if agenda.rungs else []:
        if found.correlation is None:
            continue
        line = f"rung at step {found.rung}: rank correlation with the end {found.correlation:.2f} "
        line += f"({found.n} variants that always run to the end)"
        if found.correlation < LITTLE_TRUST:
            line += "; it misleads: raise asha.grace_steps"
        lines.append(line)
    return lines


def what_comes_next(agenda: Agenda, comparison: Comparison | None) -> Iterator[str]:
    """Commands for a shell: look and listen, write it down, use the best run; TensorBoard's."""
    folder, place = shlex.quote(agenda.folder), tensorboard.folder_of(agenda.folder)
    yield "What comes next:"
    yield f"  uv run python -m bgray.dashboard {folder}"
    yield f"  uv run python -m bgray.report {folder}"
    if best := best_run(agenda, comparison):
        run, task = shlex.quote(best.url), best.experiment.task.name
        file = "mid" if build_task(best.experiment).kind == "roll" else "wav"
        command = f"apply {run} in.{file} --output out.{file}"
        if task == "separation":
            command = f"evaluate {run}"
        yield f"  uv run python -m bgray.{command}  # {best.title}"
    with_s3 = "--with boto3 " if storage.is_remote(place) else ""
    yield f"  uv run {with_s3}tensorboard --logdir {shlex.quote(place)}"


def best_run(agenda: Agenda, comparison: Comparison | None) -> Trial | None:
    """The finished run with the best last score, of the first variant that is better, by the order
    of the comparison; else of the first that may be, by its mean; else of the baseline. Of all
    where nothing is compared; None where none has finished."""
    sign = 1 if agenda.sweep.mode == "min" else -1
    scores = {run_id: known.scores.get(known.step) for run_id, known in agenda.known.items()}
    done = [
        (sign * score, number, trial)
        for number, trial in enumerate(agenda.trials.values())
        if agenda.known[trial.id].state == "finished"
        and (score := scores[trial.id]) is not None
        and math.isfinite(score)
    ]
    done.sort(key=lambda found: found[:2])
    if comparison is None:
        return done[0][2] if done else None
    base, *others = comparison.rows
    better = [row for row in others if row.verdict and row.verdict.kind == "better"]
    open_ = [row for row in others if row.verdict and row.verdict.kind not in ("worse", "unstable")]
    may_be = [row for row in open_ if row.parts and sign * row.parts.mean < 0]
    for row in (*better, *may_be, base, *others):
        for _, _, trial in done:
            if trial.variant == row.id:
                return trial
    return None
