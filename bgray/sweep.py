"""Sweep: many experiments on Ray Tune with ASHA; run it again and it goes on where it was.

python -m bgray.sweep SWEEP.yaml [--dry] [--set path.to.key=value ...]
"""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from bgray import storage
from bgray.config import Sweep
from bgray.document import override, read
from bgray.resources import Plan, of_cluster, this_machine
from bgray.train import (
    ctrl_c_asks_first,
    errors_in_one_line,
    fit_workers,
    ray_storage,
    stop_asked,
)

if TYPE_CHECKING:
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
        from bgray.search import expand
        from bgray.summary import print_dry

        if "oracle" in (raw := read(args.sweep)):  # a question that nothing is trained for
            from bgray import oracle

            override(raw, tuple(args.set), args.sweep)
            sys.exit(oracle.run(raw, args.sweep, args.dry))
        sweep, trials = expand(args.sweep, tuple(args.set))
        if args.dry:
            print_dry(sweep, trials)
        else:
            sys.exit(run_sweep(sweep, trials))


# --- run


def run_sweep(sweep: Sweep, trials: "list[Trial]") -> int:
    """Run what is not done yet, print the table; exit code 1 when a trial failed, 130 after
    Ctrl-C."""
    import torch

    from bgray.cluster import ray_session
    from bgray.console import Board, Row, bar
    from bgray.experiment import prepare_data
    from bgray.records import ENDED, reopen
    from bgray.summary import close, forecast

    folder = trials[0].url.rsplit("/", 1)[0]
    rows = [Row(t.id, t.label, t.url, t.experiment.train.steps) for t in trials]
    board = Board(trials[0].experiment.name, rows, sweep.metric)
    for row in rows:
        row.refresh()
    waiting = [row for row in rows if row.state not in ENDED]
    for row in waiting:
        reopen(row.url)
    if waiting:
        if len(waiting) < len(rows):
            board.console.print(
                f"{len(rows) - len(waiting)} of {len(rows)} trials are done already; going on "
                "with the rest"
            )
        if not torch.cuda.is_available() and "RAY_ADDRESS" not in os.environ:
            # Before the music is rendered and Ray is started, which take their time as well.
            plan = Plan.make(trials[0].experiment, len(trials), this_machine())
            forecast(sweep, trials, plan.threads, plan.concurrency, board.console)
        with ray_session(dashboard=any(_nested(t) for t in trials)) as ray:
            for trial in _first_of_each_data(trials):
                with bar(board.console, "preparing data") as progress:
                    prepare_data(trial.experiment, workers=None, progress=progress)
            plan = Plan.make(trials[0].experiment, len(trials), of_cluster(ray))
            board.console.print(plan.text)
            with board.live():
                _tune(sweep, trials, plan, folder)
    close(sweep, trials, board, folder)
    states = {row.state for row in rows}
    return 1 if "failed" in states else 130 if "interrupted" in states else 0


def _nested(trial: "Trial") -> bool:
    """More than one worker: Tune drives a TorchTrainer; otherwise the Tune trial is itself the
    worker."""
    return trial.experiment.runtime.workers > 1


def _first_of_each_data(trials: "list[Trial]") -> "list[Trial]":
    from bgray.experiment import data_hash

    return list({data_hash(trial.experiment): trial for trial in reversed(trials)}.values())


def _tune(sweep: Sweep, trials: "list[Trial]", plan: Plan, folder: str) -> None:
    from ray import tune
    from ray.tune.progress_reporter import TrialProgressCallback
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from bgray.records import PRUNED, close_from_outside, reason

    class Silent(TrialProgressCallback):
        """Tune's own lines about each trial, even at verbose=0; the board has them."""

        def _print(self, msg: str) -> None:
            pass

    # Ours asks the trials to checkpoint first; Tune's stops them where they are.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # our table has the reasons
    stop_url = storage.join(folder, ".ray", f"stop-{int(time.time())}-{os.getpid()}")
    by_id = {trial.id: trial for trial in trials}
    steps = max(trial.experiment.train.steps for trial in trials)

    class Asha(ASHAScheduler):
        """ASHA that hears what an earlier try had reached, and does not judge it once more."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if result.get("replayed") else action

    scheduler: Any = FIFOScheduler()
    if sweep.asha:
        scheduler = Asha(
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
    resources = {"CPU": 0.01} if nested else plan.per_worker()
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
            callbacks=[Silent()],
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


def tune_trial(
    config: dict[str, Any], trials: "dict[str, Trial]", plan: Plan, stop_url: str
) -> None:
    """A Tune trial that is itself the training worker."""
    from ray import tune

    from bgray.context import on_ray
    from bgray.experiment import prepare_data
    from bgray.records import recorded_failure
    from bgray.trial import run_trial

    trial, stop = _start(config, trials, stop_url)
    if trial is None:
        return
    context = on_ray(
        trial.experiment,
        plan.threads,
        report=lambda step, metrics: tune.report(metrics),
        stop=stop,
    )
    with recorded_failure(trial.url):
        run_trial(trial.experiment, prepare_data(trial.experiment), context)


def drive_workers(
    config: dict[str, Any], trials: "dict[str, Trial]", plan: Plan, stop_url: str
) -> None:
    """A Tune trial that runs a TorchTrainer with several workers."""
    from ray.train._internal.session import get_session
    from ray.tune.integration.ray_train import TuneReportCallback

    from bgray.records import recorded_failure

    trial, _ = _start(config, trials, stop_url)
    if trial is None:
        return
    # The thread of a stopped trial lives on for a moment and sees its workers die.
    session = get_session()
    assert session is not None
    stopped = session.stop_event.is_set
    with recorded_failure(trial.url, stopped):
        fit_workers(
            trial.experiment,
            trial.id,
            plan,
            callbacks=(TuneReportCallback(),),
            stop_url=stop_url,
        )


def _start(config: dict[str, Any], trials: "dict[str, Trial]", stop_url: str):
    """The trial and its question for a stop; None where it has ended before (its rungs are told to
    the scheduler)."""
    from ray import tune

    from bgray.records import ENDED, read_info
    from bgray.trial import evaluations

    trial = trials[config["trial"]]
    stop = stop_asked(stop_url)
    if (read_info(trial.url) or {}).get("state") in ENDED:
        for _, metrics in evaluations(trial.url):
            tune.report({**metrics, "replayed": True})
        return None, stop
    return (None if stop() else trial), stop


if __name__ == "__main__":
    from bgray.sweep import main  # so that Ray pickles bgray.sweep.*, not __main__.*, by reference

    main()
