"""Measure this machine: python -m bgray.bench ray [EXPERIMENT] [--set ...] [--rounds N] [--json]

`ray`: steps per second of one experiment in this process (--local) and as a simple Tune trial, in
turn, A B A B; and their ratio, the figure to quote from a machine that others use as well.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bgray.config import Experiment
from bgray.train import errors_in_one_line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.bench", description="Measure this machine."
    )
    parser.add_argument("what", choices=["ray"], help="ray: a Tune trial against --local")
    parser.add_argument("experiment", nargs="?", default="sweeps/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        from bgray.experiment import absolute, load

        result = ray_overhead(absolute(load(args.experiment, tuple(args.set))), args.rounds)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name in ("local", "ray"):
        speeds = ", ".join(f"{speed:.2f}" for speed in result[name])
        print(f"{name:5}: median {statistics.median(result[name]):.2f} steps/s ({speeds})")
    pairs = ", ".join(f"{ratio:.3f}" for ratio in result["ratios"])
    print(f"Tune trial / --local: median {result['ratio']:.3f} (pair by pair: {pairs})")


def ray_overhead(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """Steady steps per second (warm-up and validation left out), each round in fresh folders.

    Both run alone, with the same number of torch threads and the same feed in the same process.
    """
    from bgray.experiment import prepare_data, run_url
    from bgray.records import read_info
    from bgray.search import Trial
    from bgray.sweep import run_sweep
    from bgray.train import train_local

    prepare_data(experiment)
    sweep = _sweep_of(experiment)
    speeds: dict[str, list[float]] = {"local": [], "ray": []}
    for _ in range(rounds):
        for where, found in speeds.items():
            with tempfile.TemporaryDirectory() as folder:
                runtime = dataclasses.replace(experiment.runtime, results=folder, threads=1)
                one = dataclasses.replace(experiment, runtime=runtime)
                with contextlib.redirect_stdout(io.StringIO()):
                    if where == "local":
                        train_local(one)
                    else:
                        url = run_url(one)
                        run_sweep(sweep, [Trial(Path(url).name, "base", one, url)])
                info = read_info(run_url(one)) or {}
                found.append(info["timing"]["steps_per_second"])
    ratios = [b / a for a, b in zip(speeds["local"], speeds["ray"], strict=True)]
    return {**speeds, "ratios": ratios, "ratio": statistics.median(ratios)}


def _sweep_of(experiment: Experiment):
    from bgray.build import build_task
    from bgray.config import Sweep

    metric, mode = next(iter(build_task(experiment).scores.items()))
    return Sweep(base={}, metric=metric, mode=mode)


if __name__ == "__main__":
    from bgray.bench import main  # so that Ray pickles bgray.bench.*, not __main__.*, by reference

    main()
