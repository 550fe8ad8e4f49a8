"""Sweep: many experiments on Ray Tune with ASHA; run it again and it goes on where it was.

python -m bgray.sweep SWEEP.yaml [--dry] [--set path.to.key=value ...]
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bgray import trackers
from bgray.config import ConfigError
from bgray.document import override, read
from bgray.records import close_from_outside, reopen
from bgray.resources import Plan, of_cluster, this_machine, wait_for_own_machines
from bgray.sweep_config import Sweep
from bgray.train import errors_in_one_line

if TYPE_CHECKING:
    from bgray.agenda import Agenda
    from bgray.console import Board
    from bgray.search import Trial

# bgray's own modules that need torch are imported inside, so that --help does not wait for it.


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.sweep", description=(__doc__ or "").splitlines()[0]
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
        from bgray.agenda import Agenda
        from bgray.forecast import print_dry
        from bgray.search import expand

        if "oracle" in (raw := read(args.sweep)):  # a question that nothing is trained for
            from bgray import oracle

            override(raw, tuple(args.set), args.sweep)
            sys.exit(oracle.run(raw, args.sweep, args.dry))
        sweep, trials = expand(args.sweep, tuple(args.set))
        trackers.refuse_missing(sweep.trackers, args.sweep)
        if args.dry:
            # With what earlier commands have drawn.
            print_dry(Agenda(sweep, trials, weigh=_weigh(trials)))
        else:
            sys.exit(run_sweep(sweep, trials))


# --- run


def run_sweep(sweep: Sweep, trials: "list[Trial]") -> int:
    """Run what is not done yet, print the tables; exit code 1 when a trial failed, 130 after
    Ctrl-C."""
    from bgray.agenda import BUDGET, Agenda
    from bgray.cautions import cautions
    from bgray.console import Board
    from bgray.leases import forget_dead, held
    from bgray.summary import close, say_what_is_done

    board = Board(trials[0].experiment.name, [], sweep.metric)
    say = board.console.print
    for text in cautions(sweep, trials):
        say(f"Careful: {text}", highlight=False, markup=False, soft_wrap=True)
    agenda, stopped = Agenda(sweep, trials, weigh=_weigh(trials)), False
    if agenda.over() and not agenda.changed():
        forget_dead(agenda.folder)  # of a command that was killed when all had ended
        _complete_events(agenda, board)
    else:
        with held(agenda.folder, say, what=f"sweep {board.title}") as lease:
            # What another command did while this one waited for it.
            agenda = Agenda(sweep, trials, weigh=_weigh(trials))
            say_what_is_done(agenda, board)
            if not agenda.over():
                stopped = _run(agenda, board, lease.lost)
            else:
                _write_events(agenda, board)
            if text := lease.lost():
                raise ConfigError(agenda.folder, [("", text)])
            agenda.look()
            agenda.write_manifest()
    _show(agenda, board)
    close(agenda, board)
    for text in _in_closing(agenda):
        say(text, highlight=False, markup=False, soft_wrap=True)
    unpaid = sweep.budget is not None and agenda.spent() and bool(agenda.waiting())
    if sweep.budget and unpaid:
        say(f"{agenda.hours():.3g} of {sweep.budget.gpu_hours:g} hours: {BUDGET}")
    states = {row.state for row in board.rows}
    stopped |= "interrupted" in states and not unpaid
    return 1 if "failed" in states else 130 if stopped else 0


def _run(agenda: "Agenda", board: "Board", lost: Callable[[], str | None]) -> bool:
    """Whether it was stopped."""
    import torch

    from bgray import packing
    from bgray.agenda import BUDGET
    from bgray.capacity import on_demand_when_spot_is_out
    from bgray.console import bar
    from bgray.experiment import prepare_data
    from bgray.forecast import warn_if_long
    from bgray.rehearsal import cost_key
    from bgray.session import dashboard_told, ray_session
    from bgray.sharing import settle
    from bgray.tuning import nested, run

    trials = list(agenda.trials.values())
    for trial in trials:
        if agenda.known[trial.id].state == "running":  # its command was killed
            reopen(trial.url)
    first, sweep = trials[0], agenda.sweep
    say = functools.partial(board.console.print, highlight=False, markup=False, soft_wrap=True)
    if not torch.cuda.is_available() and "RAY_ADDRESS" not in os.environ:
        # Before the music is rendered and Ray is started, which take their time as well.
        plan = Plan.make(first.experiment, len(trials), this_machine())
        warn_if_long(sweep, trials, plan.threads, plan.concurrency, board.console)
    patience = first.experiment.runtime.spot_patience_seconds
    with (
        ray_session(dashboard=any(nested(t) for t in trials)) as ray,
        dashboard_told(agenda.folder, say),
        on_demand_when_spot_is_out(ray, patience, board.console.print) as enough,
    ):
        wait_for_own_machines(ray, board.console.print)
        for trial in _first_of_each_data(trials):
            with bar(board.console, "preparing data") as progress:
                prepare_data(trial.experiment, workers=None, progress=progress)
        nodes = of_cluster(ray)
        plan = Plan.make(first.experiment, agenda.at_once(), nodes)
        keys = {cost_key(trial.experiment): trial.experiment for trial in trials}
        packer = packing.prepare(ray, keys, plan, agenda.folder, board.console.print)
        if packer:
            shares = [packer.share(cost_key(trial.experiment)) for trial in trials]
            plan = Plan.make(first.experiment, agenda.at_once(), nodes, shares)
            agenda.weigh = lambda trial: packer.share(cost_key(trial.experiment)).fraction
        plan = settle(plan, agenda)
        board.console.print(plan.text)
        _tell(agenda, board)
        with board.live():
            told = functools.partial(_tell, agenda, board)
            stopped = run(agenda, plan, packer, also=enough, lost=lost, changed=told, say=say)
    if lost():
        return stopped
    for run_id, why in agenda.verdicts_of_rungs().items():
        close_from_outside(agenda.trials[run_id].url, "stopped", why, over=("stopped",))
    for run_id, known in agenda.known.items():
        if known.unpaid:
            url = agenda.trials[run_id].url
            close_from_outside(url, "interrupted", BUDGET, over=("stopped", "running"))
    return stopped


def _complete_events(agenda: "Agenda", board: "Board") -> None:
    """What earlier commands could not write for TensorBoard, of a sweep with nothing left to do."""
    from bgray.leases import held
    from bgray.tensorboard import Events

    if not Events(agenda, lambda text: None).missing():
        return
    # Another command that has the folder is at it by itself; who may only read it, reads it.
    with contextlib.suppress(ConfigError, OSError):
        with held(agenda.folder, lambda text: None, what=f"sweep {board.title}"):
            _write_events(agenda, board)


def _write_events(agenda: "Agenda", board: "Board") -> None:
    from bgray.tensorboard import Events

    say = functools.partial(board.console.print, highlight=False, markup=False, soft_wrap=True)
    events = Events(agenda, say)
    events.catch_up()
    events.close()


def _tell(agenda: "Agenda", board: "Board") -> None:
    _show(agenda, board)
    agenda.write_manifest()


def _show(agenda: "Agenda", board: "Board") -> None:
    """A row on the console for every trial that there is."""
    from bgray.console import Row

    several = len({trial.seed for trial in agenda.trials.values()}) > 1
    known = {row.id for row in board.rows}
    for trial in agenda.trials.values():
        if trial.id not in known:
            label = trial.title if several else trial.label
            board.rows.append(Row(trial.id, label, trial.url, trial.experiment.train.steps))


def _in_closing(agenda: "Agenda") -> Iterator[str]:
    """What a search that learns has to say of its result."""
    from bgray.tpe import honesty

    if agenda.draws:
        if agenda.draws.why:
            yield agenda.draws.why
        if len(agenda.draws.trials) > 1:
            yield honesty(len(agenda.draws.trials))
    if agenda.population:
        titles = {run_id: trial.label for run_id, trial in agenda.trials.items()}
        yield from filter(None, [agenda.population.text(agenda.finals(), titles)])


def _weigh(trials: "list[Trial]") -> "Callable[[Trial], float]":
    """GPUs that each of the trials holds; 1 without any."""
    import torch

    from bgray.packing import Packer
    from bgray.rehearsal import cost_key

    runtime = trials[0].experiment.runtime
    anywhere = torch.cuda.is_available() or "RAY_ADDRESS" in os.environ
    if runtime.device == "cpu" or not anywhere:
        return lambda trial: 1.0
    if runtime.vram == "whole":
        return lambda trial: runtime.workers * runtime.gpus
    packer = Packer(trials[0].url.rsplit("/", 1)[0], runtime.vram)
    return lambda trial: packer.share(cost_key(trial.experiment)).fraction


def _first_of_each_data(trials: "list[Trial]") -> "list[Trial]":
    return list({trial.data_hash: trial for trial in reversed(trials)}.values())


if __name__ == "__main__":
    from bgray.sweep import main  # so that Ray pickles bgray.sweep.*, not __main__.*, by reference

    main()
