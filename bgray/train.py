"""Train one experiment: in this process (--local), or on Ray Train with DDP over its workers.

python -m bgray.train EXPERIMENT.yaml [--local] [--describe] [--set path.to.key=value ...]
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from bgray import storage
from bgray.config import ConfigError, Experiment
from bgray.resources import Plan, of_cluster, wait_for_own_machines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.train", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("experiment", help="YAML file; of a sweep, its base is trained")
    parser.add_argument(
        "--local",
        action="store_true",
        help="this process, no Ray: breakpoints work, Ctrl-C checkpoints",
    )
    parser.add_argument(
        "--describe", action="store_true", help="print one JSON object about it and start nothing"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. model.kernels=[7,23,41]",
    )
    args = parser.parse_args(argv)
    with errors_in_one_line():
        from bgray.experiment import absolute, describe, load

        experiment = absolute(load(args.experiment, tuple(args.set)))
        if args.describe:
            print(json.dumps(describe(experiment), indent=1))
        elif args.local:
            train_local(experiment)
        else:
            train_on_ray(experiment)


@contextlib.contextmanager
def errors_in_one_line(*, resumes: bool = True) -> Iterator[None]:
    """What a person can mend ends in its message and exit code 2, without a traceback.

    resumes: whether the same command goes on from what is written.
    """
    from bgray.records import Superseded

    try:
        yield
    except ConfigError as error:
        message, code = f"error: {error}", 2
    except BrokenPipeError:  # `| head` has seen enough
        message, code = "", 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Superseded as error:
        message, code = f"error: {error}", 2
    except OSError as error:
        # Full disk, no permission, storage that does not answer: what is written stays.
        where = f" ({error.filename})" if error.filename else ""
        again = "mend that and run the same command again"
        again += ": it continues" if resumes else ""
        message, code = f"error: {error.strerror or error}{where}; {again}", 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
        message += "; the same command goes on from what is written" if resumes else ""
    else:
        return
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def ctrl_c_asks_first(
    say: Callable[[str], None] = print, also: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], str]]:
    """The first Ctrl-C (or SIGTERM, which is how a job on a cluster is stopped) asks for a stop at
    the next step, with a checkpoint; the second one interrupts at once.

    also: done at the first one. Yields a question: records.CTRL_C once it was asked, else nothing.
    """
    from bgray.records import CTRL_C

    asked = ""

    def handler(*_: object) -> None:
        nonlocal asked
        asked = CTRL_C
        say("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once")
        restore()
        also()

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        restore()


# --- here


def train_local(experiment: Experiment) -> None:
    """Train in this process. Ctrl-C once leaves a checkpoint to go on from, and exits with 130."""
    from bgray.console import bar
    from bgray.context import Context, pick_device
    from bgray.experiment import prepare_data
    from bgray.leases import held
    from bgray.records import is_done
    from bgray.trial import run_to_its_end

    board = board_of(experiment)
    board.rows[0].refresh()
    if is_done(board.rows[0].info, experiment.train.steps):
        board.console.print("already done:")
        closing(board)
        return
    with bar(board.console, "preparing data") as progress:
        prepared = prepare_data(experiment, progress=progress)
    with (
        held(board.rows[0].url, board.console.print, what=f"training {board.title}"),
        ctrl_c_asks_first() as stop,
        board.live(),
    ):
        context = Context(
            device=pick_device(experiment.runtime.device),
            threads=experiment.runtime.threads or os.cpu_count() or 1,
            stop=stop,
            warn=lambda text: None,  # the board has it from run.json
        )
        run_to_its_end(experiment, prepared, context)
    closing(board)
    if board.rows[0].state != "finished":
        sys.exit(130 if board.rows[0].state == "interrupted" else 1)


def board_of(experiment: Experiment):
    """The console of a single run."""
    from bgray.build import build_task
    from bgray.console import Board, Row
    from bgray.experiment import identity, run_url

    metric = next(iter(build_task(experiment).scores))
    row = Row(identity(experiment), experiment.name, run_url(experiment), experiment.train.steps)
    return Board(experiment.name, [row], metric)


def closing(board: Any) -> None:
    """The last words: numbers against doing nothing, and where everything is."""
    row = board.rows[0]
    row.refresh()
    metrics, baseline = row.info.get("metrics", {}), row.info.get("baseline", {})
    for name, value in baseline.items():
        if name in metrics:
            board.console.print(
                f"{name} {metrics[name]:.4f} at step {metrics['step']} (unprocessed input: "
                f"{value:.4f})"
            )
    if row.state == "interrupted":
        board.console.print("interrupted: the same command goes on from the checkpoint")
    elif row.info.get("reason"):
        board.console.print(f"{row.state}: {row.info['reason']}", markup=False)
    board.console.print(f"in {row.url}", soft_wrap=True)


# --- on Ray Train


def train_on_ray(experiment: Experiment) -> None:
    """Train on Ray Train with `runtime.workers` workers; the run's folder is the result."""
    from bgray.capacity import on_demand_when_spot_is_out
    from bgray.console import bar
    from bgray.experiment import identity, prepare_data
    from bgray.leases import held
    from bgray.records import is_done, recorded_failure, reopen
    from bgray.session import ray_session

    board = board_of(experiment)
    with bar(board.console, "preparing data") as progress:
        prepare_data(experiment, workers=None, progress=progress)
    board.rows[0].refresh()
    if is_done(board.rows[0].info, experiment.train.steps):
        board.console.print("already done:")
        closing(board)
        return
    patience = experiment.runtime.spot_patience_seconds
    with (
        held(board.rows[0].url, board.console.print, what=f"training {board.title}"),
        ray_session() as ray,
        on_demand_when_spot_is_out(ray, patience, board.console.print),
    ):
        wait_for_own_machines(ray, board.console.print)
        plan = Plan.make(experiment, 1, of_cluster(ray))
        url = board.rows[0].url
        reopen(url)
        session = new_session()
        folder = storage.join(experiment.runtime.results, experiment.name, ".ray")
        stop_url = storage.join(folder, f"stop-{session}")

        def fit() -> None:
            with recorded_failure(url):
                run_id = identity(experiment)
                fit_workers(experiment, run_id, plan, stop_url=stop_url, session=session)

        with (
            board.live(),
            ctrl_c_asks_first(also=lambda: storage.write_bytes(stop_url, b"")) as asked,
        ):
            # Train puts its own way of stopping in the place of ours, but in the main thread only.
            thread = threading.Thread(target=fit, daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(0.5)
        if asked():
            storage.remove(stop_url)
    closing(board)
    if board.rows[0].state != "finished":
        sys.exit(130 if board.rows[0].state == "interrupted" else 1)


def fit_workers(
    experiment: Experiment,
    run_id: str,
    plan: Plan,
    *,
    callbacks: tuple[Any, ...] = (),
    stop_url: str | None = None,
    session: str = "",
) -> None:
    """One TorchTrainer.fit: DDP over the experiment's workers; raises what ended it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    warnings.filterwarnings("ignore", module="ray")
    path, filesystem = ray_storage(experiment)
    TorchTrainer(
        train_worker,
        train_loop_config={
            "experiment": experiment,
            "plan": plan,
            "stop_url": stop_url,
            "session": session or new_session(),
        },
        scaling_config=ScalingConfig(
            num_workers=experiment.runtime.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=plan.per_worker(),
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            callbacks=list(callbacks),
        ),
    ).fit()


def ray_storage(experiment: Experiment) -> tuple[str, Any]:
    """Where Ray keeps its own files: a hidden folder beside the runs. (path, pyarrow file system
    or None)"""
    url = storage.join(experiment.runtime.results, experiment.name, ".ray")
    if not storage.is_remote(url):
        return url, None
    import pyarrow.fs

    fs, path = storage.filesystem(
        url
    )  # s3fs, which honours AWS_ENDPOINT_URL; pyarrow's own S3 client does not
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def train_worker(config: dict[str, Any]) -> None:
    """Runs on every Train worker."""
    import ray.train

    from bgray.context import on_ray
    from bgray.experiment import prepare_data, run_url
    from bgray.trial import run_to_its_end

    experiment: Experiment = config["experiment"]
    worker = ray.train.get_context()
    context = on_ray(
        experiment,
        config["plan"],
        session=config["session"],
        rank=worker.get_world_rank(),
        world=worker.get_world_size(),
        report=lambda step, metrics: ray.train.report(metrics),
        stop=stop_asked(config["stop_url"]),
    )
    run_to_its_end(experiment, prepare_data(experiment), context)
    go_on_elsewhere(run_url(experiment))


MAX_RESTARTS = 30
"""Of a trial whose process or machine died; `records.died_in_vain` ends it much sooner when it gets
nowhere, so that only spot machines coming and going reach it."""


class TakenAway(RuntimeError):
    """This trial's machine goes; Tune or Train starts it again on another one, from its
    checkpoint."""


def go_on_elsewhere(url: str) -> None:
    """Raise TakenAway where the run in this folder stopped because its machine goes."""
    from bgray.records import NOTICE, read_info

    info = read_info(url) or {}
    if info.get("state") == "interrupted" and info.get("reason") == NOTICE:
        raise TakenAway(f"stopped with a checkpoint at step {info.get('step')}: {NOTICE}")


def new_session() -> str:
    """A name for this command that no other has."""
    return f"{int(time.time())}-{os.getpid()}"


def stop_asked(url: str | None) -> Callable[[], str]:
    """Why this worker of a Ray session should stop: the driver asks, by a file that every worker
    can see, or the machine is being drained.

    Looks at most once a second; for the file on S3, whose answer takes some 30 ms, once in five.
    """
    import ray
    from ray._private.state import state

    from bgray.records import CTRL_C, NOTICE

    node, reason = ray.get_runtime_context().get_node_id(), ""
    pause = 5.0 if url and storage.is_remote(url) else 1.0
    asked = looked = 0.0

    def ask() -> str:
        nonlocal asked, looked, reason
        now = time.monotonic()
        if not reason and now - asked > 1.0:
            asked = now
            reason = NOTICE if node in state.get_draining_nodes() else ""
        if not reason and url and now - looked > pause:
            looked = now
            reason = CTRL_C if storage.is_there_now(url) else ""
        return reason

    return ask


if __name__ == "__main__":
    from bgray.train import main  # so that Ray pickles bgray.train.*, not __main__.*, by reference

    main()
