"""Cluster: check its file, wait for its nodes, run sweeps on it, take it down for certain.

python -m bgray.cluster check|wait|submit|stop|down FILE ...
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import Any

from bgray.problems import ConfigError
from bgray.remote import Cluster, Unreachable, read_cluster
from bgray.train import errors_in_one_line


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    with errors_in_one_line(resumes=False), _gone_in_one_line():
        sys.exit(args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.cluster", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", help="the cluster's YAML, e.g. cluster/gpu.yaml")
        command.set_defaults(run=run)
        return command

    add("check", _check, "what is wrong with the file, before money is spent")
    wait = add("wait", _wait, "until nodes have joined, or the reason why they do not")
    wait.add_argument("--type", default="", help="node type; without it any worker counts")
    wait.add_argument("--count", type=_positive, default=1, help="nodes of it (1)")
    wait.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="(900)")
    submit = add("submit", _submit, "run a sweep on the cluster and follow it; again: come back")
    submit.add_argument("sweep", help="the sweep's YAML; its results must be on s3:// or shared")
    submit.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as bgray.sweep has it"
    )
    submit.add_argument("--detach", action="store_true", help="start it and leave")
    stop = add("stop", _stop, "have a sweep save its trials and end")
    stop.add_argument("sweep", help="the sweep's YAML, or its name")
    down = add("down", _down, "end the cluster, and look that nothing is left running")
    down.add_argument("-y", "--yes", action="store_true", help="do not ask")
    # What `wait` and `submit` ask the head for.
    commands.add_parser("state").set_defaults(run=_state)
    commands.add_parser("code").set_defaults(run=_code)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def _gone_in_one_line() -> Iterator[None]:
    try:
        yield
    except Unreachable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


# --- the commands; each returns the exit code


def _check(args: argparse.Namespace) -> int:
    from bgray import cluster_check

    return cluster_check.report(args.file)


def _wait(args: argparse.Namespace) -> int:
    from bgray import fleet

    cluster = read_cluster(args.file)
    return 0 if fleet.wait(cluster, args.type, args.count, args.timeout, say) else 1


def _state(args: argparse.Namespace) -> int:
    from bgray import fleet_state

    print(json.dumps(fleet_state.state()))
    return 0


def _code(args: argparse.Namespace) -> int:
    from bgray import shipment

    print(shipment.package_digest())
    return 0


def _submit(args: argparse.Namespace) -> int:
    from bgray import jobs, remote, shipment

    cluster = read_cluster(args.file)
    remote.auth_token()  # before the sweep is resolved, which takes a while
    spec = shipment.prepare(cluster, args.sweep, tuple(args.set))
    for note in spec.notes:
        say(note)
    with jobs.connected(cluster, say) as head:
        environment = jobs.warn_of_other_code(cluster, say)
        job = jobs.submit(head, spec, say, environment)
        settings = [word for item in args.set for word in ("--set", item)]
        ways = f"\n  come back: {_command('submit', args.file, args.sweep, *settings)}"
        ways += f"\n  stop it:   {_command('stop', args.file, args.sweep)}"
        if args.detach:
            say(f"not followed{ways}")
            return 0
        with _hang_up_is_ctrl_c():
            try:
                return jobs.follow(head, job, _write, say)
            except KeyboardInterrupt:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    say(f"\nleft; job {job} goes on{ways}")
                return 130


def _command(*words: str) -> str:
    """What to paste into a shell."""
    return shlex.join(["python", "-m", "bgray.cluster", *words])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _hang_up_is_ctrl_c() -> Iterator[None]:
    """A closed terminal, or SIGTERM, leaves the job as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(args: argparse.Namespace) -> int:
    from bgray import jobs
    from bgray.document import read

    name = args.sweep
    if os.path.exists(name) or name.endswith((".yaml", ".yml")):
        name = str(read(name)["name"])
    with jobs.connected(read_cluster(args.file), say) as head:
        if not jobs.stop(head, name, say):
            running = ", ".join(j["metadata"]["bgray_sweep"] for j in jobs.running(head))
            say(f"no job of '{name}' runs" + (f"; there is {running}" if running else ""))
    return 0


def _down(args: argparse.Namespace) -> int:
    from bgray import fleet

    cluster = read_cluster(args.file)
    if not args.yes:
        for line in (*_running(cluster), *fleet.ends(cluster)):
            say(line)
        if not sys.stdin.isatty():
            raise ConfigError(args.file, [("", "asks before it ends a cluster: -y says yes")])
        if input(f"end the cluster '{cluster.name}'? [y/N] ").strip().lower() not in ("y", "yes"):
            say("left as it is")
            return 1
    return 0 if fleet.down(cluster, say) else 1


def _running(cluster: Cluster) -> list[str]:
    """What would be lost; a head that cannot be asked does not keep a cluster from ending."""
    from bgray import jobs

    try:
        with jobs.connected(cluster, say) as head:
            return [f"runs: {job['submission_id']}" for job in jobs.running(head)]
    except (Unreachable, ConfigError) as error:
        return [f"which jobs run cannot be said: {error}"]


if __name__ == "__main__":
    from bgray.cluster import main  # so that what is pickled is bgray.cluster.*, not __main__.*

    main()
