"""Measure this machine: python -m bgray.bench feed|step|sweep|ray|pack|page [EXPERIMENT]

`feed`: CPU time to make a segment: pure computing, a torch DataLoader, bgray's feeds; and how many
cores a GPU needs.
`step`: steps per second against the plainest loop that does the same; parts, floor, profile.
`sweep`: what a sweep costs besides its steps: from one trial to the next, and trials an hour.
`ray`: steps per second of one experiment in this process (--local) and as a simple Tune trial, in
turn, A B A B; and their ratio, the figure to quote from a machine that others use as well.
`pack`: steps per second of one trial alone on a GPU, and of as many as its memory holds, each
within its limit, in turn; on made-up data, so that no feed slows them.
`page`: from a made-up sweep's files to figures, as page and report draw them: time and memory.
"""

import argparse
import json
from typing import Any

from bgray.config import Experiment
from bgray.train import errors_in_one_line


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    with errors_in_one_line(resumes=False):
        found, text = {
            "feed": _feed,
            "step": _step,
            "sweep": _sweep,
            "ray": _ray,
            "pack": _pack,
            "page": _page,
        }[args.what](args)
        print(json.dumps(found, indent=1) if args.json else text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.bench", description="Measure this machine."
    )
    whats = parser.add_subparsers(dest="what", required=True, metavar="what")

    def command(name: str, text: str, default: str = "") -> Any:
        one = whats.add_parser(name, help=text, description=text)
        if default:
            one.add_argument("experiment", nargs="?", default=default)
            one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
            one.add_argument("--rounds", type=int, default=3, help="of each, in turn")
        one.add_argument("--json", action="store_true", help="print one JSON object instead")
        return one

    feed = command("feed", "what a segment costs to make, and cores per GPU", "sweeps/unshift.yaml")
    feed.add_argument("--light", action="store_true", help="decoding and a low-pass, too")
    feed.add_argument("--heavy", action="store_true", help="two pitch shifts an example, too")
    feed.add_argument("--units", type=int, help="work units in each turn; default: 4 s of CPU")
    feed.add_argument("--no-ray", action="store_true", help="leave Ray Data out")
    text = "the GPU's speed, as bench step prints it; default: 10,000 steps in 100 s"
    feed.add_argument("--segments-per-second", type=float, metavar="N", help=text)

    step = command("step", "what a step takes, and why", "sweeps/unshift.yaml")
    step.add_argument("--steps", type=int, help="timed in each turn; default: 5 seconds of them")
    step.add_argument("--seconds", type=float, default=5.0, help="timed in each turn, about")
    step.add_argument("--batch", type=int, help="instead of train.batch_size")
    step.add_argument("--choices", action="store_true", help="each choice alone the other way")
    step.add_argument("--ray", action="store_true", help="the same run on Ray, too")
    step.add_argument("--profile", action="store_true", help="operators, and who waits for whom")
    step.add_argument("--trace", metavar="FILE", help="the profile as a Chrome trace")
    step.add_argument("--targets", nargs="*", metavar="NET", help="the table of log 002's nets")
    step.add_argument("--scaling", action="store_true", help="batch, segment, steps: how it grows")
    text = "memory over so many steps of a tiny net (10000)"
    step.add_argument("--soak", type=int, nargs="?", const=10_000, metavar="STEPS", help=text)

    sweep = command("sweep", "from one trial to the next", "sweeps/quickstart.yaml")
    sweep.add_argument("--trials", type=int, default=4, help="of each small sweep")
    sweep.add_argument("--steps", type=int, default=30, help="of each trial")

    command("ray", "a Tune trial against --local", "sweeps/quickstart.yaml")

    pack = command("pack", "trials that share a GPU against one alone", "sweeps/quickstart.yaml")
    pack.add_argument("--seconds", type=float, default=20.0, help="timed in each round")
    pack.add_argument("--most", type=int, default=8, help="trials at a time at most")

    page = command("page", "from a sweep's files to figures")
    page.add_argument("--trials", type=int, default=200, help="of one variant each two")
    page.add_argument("--steps", type=int, default=10_000, help="of each trial")
    page.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    return parser


def _experiment(args: argparse.Namespace, *more: str) -> Experiment:
    from bgray.experiment import absolute, load

    return absolute(load(args.experiment, (*args.set, *more)))


def _feed(args: argparse.Namespace) -> tuple[Any, str]:
    from bgray import bench_feed

    found = bench_feed.measured(
        _experiment(args),
        light=args.light,
        heavy=args.heavy,
        rounds=args.rounds,
        units=args.units,
        ray=not args.no_ray,
        wanted=args.segments_per_second,
    )
    return found, bench_feed.as_text(found)


def _step(args: argparse.Namespace) -> tuple[Any, str]:
    from bgray import bench_step, bench_targets

    options = bench_step.Options(
        rounds=args.rounds,
        seconds=args.seconds,
        steps=args.steps,
        choices=args.choices,
        ray=args.ray,
        profile=args.profile,
        trace=args.trace,
    )
    if args.soak is not None:
        found = bench_targets.soaked(args.soak)
        return found, bench_targets.soak_text(found)
    if args.targets is not None:
        found = bench_targets.targets(args.targets, options, args.batch, tuple(args.set))
        return found, bench_targets.targets_text(found)
    batch = () if args.batch is None else (f"train.batch_size={args.batch}",)
    experiment = _experiment(args, *batch)
    if args.scaling:
        found = bench_targets.scaled(experiment, options)
        return found, bench_targets.scaling_text(found)
    found = bench_step.measured(experiment, options)
    return found, bench_step.as_text(found)


def _sweep(args: argparse.Namespace) -> tuple[Any, str]:
    from bgray import bench_sweep
    from bgray.search import expand

    found = bench_sweep.measured(
        _experiment(args),
        own_trials=len(expand(args.experiment, tuple(args.set))[1]),
        trials=args.trials,
        steps=args.steps,
        rounds=args.rounds,
    )
    return found, bench_sweep.as_text(found)


def _ray(args: argparse.Namespace) -> tuple[Any, str]:
    from bgray import bench_ray

    found = bench_ray.ray_overhead(_experiment(args), args.rounds)
    return found, bench_ray.ray_text(found)


def _pack(args: argparse.Namespace) -> tuple[Any, str]:
    from bgray import bench_ray

    found = bench_ray.packed(_experiment(args), args.rounds, args.seconds, args.most)
    return found, bench_ray.pack_text(found)


def _page(args: argparse.Namespace) -> tuple[Any, str]:
    from bgray import bench_page

    found = bench_page.measured(args.trials, args.steps, args.log_every)
    return found, bench_page.as_text(found)


if __name__ == "__main__":
    from bgray.bench import main  # so that Ray pickles bgray.bench.*, not __main__.*, by reference

    main()
