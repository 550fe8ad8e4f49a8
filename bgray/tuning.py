"""Runs an agenda's trials on Ray Tune.

Tune holds the machines and starts processes again that died; what runs next, and how far, the
agenda says.
"""

import contextlib
import dataclasses
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgray import storage, tensorboard, trackers, warm
from bgray.agenda import Agenda
from bgray.build import build_task
from bgray.config import ConfigError
from bgray.packing import Packer
from bgray.rehearsal import cost_key
from bgray.resources import Plan, Share
from bgray.train import (
    MAX_RESTARTS,
    ctrl_c_asks_first,
    fit_workers,
    go_on_elsewhere,
    new_session,
    ray_storage,
    stop_asked,
)

if TYPE_CHECKING:
    from bgray.search import Trial

HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head."""


def nested(trial: "Trial") -> bool:
    """More than one worker: Tune drives a TorchTrainer; otherwise the Tune trial is itself the
    worker."""
    return trial.experiment.runtime.workers > 1


def run(
    agenda: Agenda,
    plan: Plan,
    packer: Packer | None = None,
    *,
    also: Callable[[], None] = lambda: None,
    lost: Callable[[], str | None] = lambda: None,
    changed: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> bool:
    """Until the agenda is over, or a stop is asked for, which is returned.

    packer: where trials share GPUs, what each gets of one. also: done at the first Ctrl-C.
    lost: why this command may not go on (another one has taken the sweep over), or empty.
    changed: told when the agenda has more trials than before, or another one has ended.
    say: told what keeps TensorBoard or another tracker from getting everything.
    """
    from ray import tune
    from ray.tune import Callback
    from ray.tune.progress_reporter import TrialProgressCallback
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.stopper import NoopStopper, Stopper

    from bgray.records import PRUNED, close_from_outside, read_info, reason, reopen, sweep_up

    first = next(iter(agenda.trials.values()))
    session = new_session()
    stop_url = storage.join(agenda.folder, ".ray", f"stop-{session}")
    sweep_up(agenda.folder, r"(sweep|validation-\w+)\.json")

    def stop() -> None:
        also()
        storage.write_bytes(stop_url, b"")

    def stopping() -> bool:
        return bool(asked() or lost() or broken)

    def ours(url: str) -> bool:
        """Whether no other command has begun this run meanwhile."""
        attempts = (read_info(url) or {}).get("attempts") or [{}]
        return attempts[-1].get("session", session) == session

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        """What cannot be written (a full disk, say) ends the sweep after what is running."""
        try:
            yield
        except OSError as error:
            if not broken:
                broken.append(error)
                with contextlib.suppress(OSError):
                    stop()

    class Silent(TrialProgressCallback):
        """Tune's own lines about each trial, even at verbose=0; the board has them."""

        running = told = False

        def _print(self, msg: str) -> None:
            pass

        def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
            self.running = any(trial.status == "RUNNING" for trial in trials)
            if not self.told and lost():
                self.told = True
                stop()

        def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            if why := _not_clean(trial):  # for the record that the new process writes
                trial.set_config({**trial.config, "why_new": why})

        def __reduce__(self) -> Any:  # Tune keeps copies on disk, which nobody reads
            return Callback, ()

    class NoneLeft(Stopper):
        """After a stop, trials that still wait for a machine are not waited for."""

        def __call__(self, trial_id: str, result: dict) -> bool:
            return False

        def stop_all(self) -> bool:
            return stopping() and not silent.running

        def __reduce__(self) -> Any:
            return NoopStopper, ()

    class Next(Searcher):
        """What Tune asks for another trial."""

        def suggest(self, trial_id: str) -> Any:
            while not stopping():
                trial = None
                try:
                    with writing():
                        if trial := agenda.start():
                            # A warm process that has stopped ours keeps it until its next trial.
                            reopen(trial.url, ours=trial.id in started)
                            changed()
                except ConfigError:  # another process is at it
                    assert trial is not None
                    agenda.lose(trial.id)
                    continue
                if trial is None:
                    break
                if broken:
                    agenda.lose(trial.id)
                    break
                started.add(trial.id)
                by_tune[trial_id] = trial
                # Of a variant that was not known when the processes were told of them, all of it.
                new = {} if trial.variant in told else {"drawn": trial}
                share = packer and dataclasses.asdict(packer.share(cost_key(trial.experiment)))
                known = {"trial": trial.id, "variant": trial.variant, "seed": trial.seed}
                return {**known, "share": share, **new}
            return Searcher.FINISHED if stopping() or agenda.over() else None

        def on_trial_complete(
            self, trial_id: str, result: dict | None = None, error: bool = False
        ) -> None:
            trial = by_tune[trial_id]
            with writing():
                if not lost() and ours(trial.url):  # or what it says is another command's
                    if not error:  # it may not say so before its process gets another trial
                        close_from_outside(trial.url, "stopped", PRUNED)
                    if packer:
                        packer.learn(cost_key(trial.experiment), read_info(trial.url) or {})
                    agenda.close(trial.id, failed=error)
                    changed()
            if agenda.known[trial.id].started is not None:
                agenda.lose(trial.id)

        def on_trial_result(self, trial_id: str, result: dict) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:  # our own records are the truth
            pass

        restore = save

        def __reduce__(self) -> Any:
            return Searcher, ()

    class Judge(FIFOScheduler):
        """Stops a trial where the agenda does not let it go on."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            if "step" not in result:
                return TrialScheduler.CONTINUE
            go_on = agenda.report(trial.config["trial"], result["step"], result)
            return TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP

        def __reduce__(self) -> Any:
            return FIFOScheduler, ()

    # Ours asks the trials to checkpoint first; Tune's stops them where they are.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # our table has the reasons
    silent = Silent()
    broken: list[OSError] = []
    by_tune: dict[str, Trial] = {}
    started: set[str] = set()
    told = dict(agenda.variants)
    trainable: Any = tune.with_parameters(
        drive_workers if nested(first) else tune_trial,
        # The agenda adds some later: a shortlist's are these with other seeds.
        variants=told,
        plan=plan,
        stop_url=stop_url,
        session=session,
    )
    if not nested(first):
        trainable = _lasting(trainable)

    # The driver of a nested trial only waits; its workers ask for the resources. On the head it
    # outlives them.
    def resources(config: dict[str, Any]) -> Any:
        each = {HEAD: 0.001} if nested(first) else plan.per_worker(_share(config))
        return tune.PlacementGroupFactory([each])

    def dirname(trial: Any) -> str:
        return tensorboard.dirname(agenda.trials[trial.config["trial"]])

    path, filesystem = ray_storage(first.experiment)
    events = tensorboard.Events(agenda, say)
    events.catch_up()
    others = trackers.callbacks(
        agenda.sweep.trackers,
        first.experiment.name,
        lambda id: (tensorboard.dirname(agenda.trials[id]), events.values(agenda.trials[id])),
        list(build_task(first.experiment).scores),
        say,
    )
    with ctrl_c_asks_first(also=stop) as asked:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=Next(),
                num_samples=-1,
                scheduler=Judge(),
                max_concurrent_trials=plan.concurrency,
                # A new process takes longer to come up than many a trial has between two steps.
                reuse_actors=warm.wanted() and not nested(first),
                trial_dirname_creator=dirname,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[silent, tensorboard.callback(events), *others],
                stop=NoneLeft(),
                failure_config=tune.FailureConfig(max_failures=MAX_RESTARTS),
            ),
        )
        try:
            results = tuner.fit()
        except Exception as error:  # of Tune's own files
            if (cause := _about_storage(error)) is None:
                raise
            broken.append(cause)
        finally:
            events.close()
    if broken:
        raise broken[0]
    if asked() or lost():
        storage.remove(stop_url)
        return bool(asked())
    for result in results:  # a process that was killed could not say how its run ended
        url = agenda.trials[(result.config or {})["trial"]].url
        if not ours(url):
            continue
        if result.error is None:
            close_from_outside(url, "stopped", PRUNED)
        else:
            close_from_outside(url, "failed", reason(result.error))
    return False


def _trial(config: dict[str, Any], variants: "dict[str, Trial]") -> "Trial":
    """What Tune asks a process to train."""
    return config.get("drawn") or variants[config["variant"]].with_seed(config["seed"])


def _about_storage(error: BaseException | None) -> OSError | None:
    """The first OSError with a number that led to this one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        error = error.__cause__ or error.__context__
    return None


def _share(config: dict[str, Any]) -> Share | None:
    return config["share"] and Share(**config["share"])


def _lasting(function: Any) -> Any:
    """Tune's class for a function, whose process is given up where a stopped trial does not end in
    it: Tune itself would give up the trial that was to run there next."""
    from ray.train._internal.session import shutdown_session
    from ray.tune.trainable import wrap_function

    class Lasting(wrap_function(function)):
        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not super().reset_config(new_config):
                warm.wear_out("the trial before does not end")  # the next one says so by NotClean
                shutdown_session()
                self.setup(new_config)
            return True

    return Lasting


def _not_clean(trial: Any) -> str:
    """Why the process that a Tune trial was given would not have it; empty where it was another
    error."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path(trial.error_file or "").read_text()
    # Of all its failures, the last one.
    found = re.findall(r"bgray\.warm\.NotClean: (.*)", text.rpartition("Failure #")[2])
    return found[-1] if found else ""


def tune_trial(
    config: dict[str, Any], variants: "dict[str, Trial]", plan: Plan, stop_url: str, session: str
) -> None:
    """A Tune trial that is itself the training worker."""
    from ray import tune

    from bgray.starts import Start

    trial, stop = _trial(config, variants), stop_asked(stop_url)
    if stop():
        return
    entered = time.time()
    start = Start(warm=warm.ready(), why_new=config.get("why_new", ""), began=entered)
    start.mark("clean")
    from bgray.context import on_ray
    from bgray.experiment import prepare_data
    from bgray.records import recorded_failure
    from bgray.trial import run_trial

    start.mark("imports")
    context = on_ray(
        trial.experiment,
        plan,
        _share(config),
        session=session,
        report=lambda step, metrics: tune.report(metrics),
        stop=stop,
        start=start,
    )
    with recorded_failure(trial.url), warm.watched():
        prepared = prepare_data(trial.experiment)
        start.mark("data")
        run_trial(trial.experiment, prepared, context)
    go_on_elsewhere(trial.url)


def drive_workers(
    config: dict[str, Any], variants: "dict[str, Trial]", plan: Plan, stop_url: str, session: str
) -> None:
    """A Tune trial that runs a TorchTrainer with several workers."""
    from ray.train._internal.session import get_session
    from ray.tune.integration.ray_train import TuneReportCallback

    from bgray.records import recorded_failure

    trial = _trial(config, variants)
    if stop_asked(stop_url)():
        return
    # The thread of a stopped trial lives on for a moment and sees its workers die.
    tune_session = get_session()
    assert tune_session is not None
    stopped = tune_session.stop_event.is_set
    with recorded_failure(trial.url, stopped):
        fit_workers(
            trial.experiment,
            trial.id,
            plan,
            callbacks=(TuneReportCallback(),),
            stop_url=stop_url,
            session=session,
        )
