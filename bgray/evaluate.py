"""Evaluate: trained runs on whole tracks, scored as papers print it: BSSEval v4, uSDR, SI-SDR.

python -m bgray.evaluate RUN [RUN ...] [--tracks FOLDER] [--seconds 30]
    [--checkpoint latest|best] [--device auto]

Writes <run>/evaluation/scores.json, and box plots of all runs beside the first one's; scores of
other tracks, or of parts of them, get names of their own.
"""

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from bgray import storage
from bgray.config import ConfigError, digest
from bgray.encoding import to_int16
from bgray.tracks import Track, find
from bgray.train import errors_in_one_line

if TYPE_CHECKING:
    from bgray.inference import Trained

MANY = 3  # tracks from which on Ray spreads them over the machine
UNCHANGED = "unprocessed input"
REST = "all that is not a target"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.evaluate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", help="folders <results>/<name>/<id>")
    parser.add_argument(
        "--tracks",
        help="folder of stem folders (MUSDB18-HQ's test), or shards, of which the validation "
        "split is read; default: the validation split of each run's own data",
    )
    parser.add_argument("--seconds", type=float, help="only the beginning of each track")
    parser.add_argument("--limit", type=int, help="only the first so many tracks")
    parser.add_argument("--overlap", type=float, default=0.25, help="of chunks, 0 to 0.5")
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="best: by the run's own validation, which flatters; do not compare runs by it",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    with errors_in_one_line(resumes=False):
        _check_arguments(args)
        results = {}
        for url in args.runs:
            result = evaluate(
                url.rstrip("/"),
                tracks=args.tracks,
                seconds=args.seconds,
                limit=args.limit,
                overlap=args.overlap,
                device=args.device,
                checkpoint=args.checkpoint,
            )
            results[url.rstrip("/")] = result
            show(result)
        if any("bss" in result for result in results.values()):
            draw(results)


def _check_arguments(args: argparse.Namespace) -> None:
    problems = []
    if not 0 <= args.overlap <= 0.5:
        problems.append(("--overlap", f"must be 0 to 0.5, got {args.overlap:g}"))
    if args.seconds is not None and not args.seconds > 0:
        problems.append(("--seconds", f"must be above 0, got {args.seconds:g}"))
    if args.limit is not None and args.limit < 1:
        problems.append(("--limit", f"must be at least 1, got {args.limit}"))
    if problems:
        raise ConfigError("python -m bgray.evaluate", problems)


def evaluate(
    url: str,
    *,
    tracks: str | None = None,
    seconds: float | None = None,
    limit: int | None = None,
    overlap: float = 0.25,
    device: str = "auto",
    checkpoint: str = "latest",
) -> dict[str, Any]:
    """Score a run on whole tracks and write <run>/evaluation/scores.json; returns what is in it.

    `task`: the task's own validation scores by track, of the run and of the unprocessed input.
    `bss`: SDR, ISR, SIR, SAR (medians over frames), uSDR and SI-SDR by track and source, and their
    medians over tracks, where the task separates. ConfigError names tracks that do not fit.
    """
    from bgray.context import pick_device
    from bgray.experiment import prepare_data
    from bgray.inference import load

    chosen = pick_device(device)
    trained = load(url, chosen, checkpoint)
    if trained.task.kind != "audio":
        raise ConfigError(url, [("", "is a piano-roll run: its validation scores are whole")])
    source = tracks or prepare_data(trained.experiment).url
    found = [track.head(seconds) for track in find(source)][:limit]
    _check(trained, found, source)
    if len(found) >= MANY:
        scored = _on_ray([(url, track, overlap, str(chosen), checkpoint) for track in found])
    else:
        scored = [evaluate_track(trained, track, overlap) for track in found]
    named = dict(zip((track.name for track in found), scored, strict=True))
    result: dict[str, Any] = {
        "run": url,
        "step": trained.step,
        "checkpoint": checkpoint,
        "source": source,
        "seconds": seconds,
        "limit": limit,
        "overlap": overlap,
        "task": {name: scores["task"] for name, scores in named.items()},
        "input": {name: scores["input"] for name, scores in named.items()},
    }
    if any("bss" in scores for scores in scored):
        from bgray.bss import over_tracks

        by_track = {name: scores["bss"] for name, scores in named.items()}
        result |= {"bss": by_track, "bss_medians": over_tracks(by_track)}
    whole = tracks is None and seconds is None and limit is None
    mark = "" if whole else f"-{digest([source, seconds, limit])[:8]}"
    mark = mark if checkpoint == "latest" else f"-{checkpoint}{mark}"
    result["place"] = storage.join(url, "evaluation", f"scores{mark}.json")
    storage.write_bytes(result["place"], json.dumps(finite(result), indent=1).encode() + b"\n")
    return result


def evaluate_track(trained: "Trained", track: Track, overlap: float) -> dict[str, Any]:
    """{task, input: metric to value; bss: source to metric to dB} of one track."""
    import torch

    from bgray.bss import score_track
    from bgray.data import Chunk

    task = task_for(trained.task, track)
    audio = track.load(task.voices)  # (V, C, T) float32
    chunk = Chunk.whole(dict(zip(task.voices, to_int16(audio), strict=True)), track.sample_rate)
    x, y = task.example([chunk], 0, None, track.frames)  # (C, T), (S, C, T) int16
    inputs, target = (sound.astype(np.float32) / task.full_scale for sound in (x, y))
    estimate = trained(inputs, overlap)
    score = task.scorer(track.sample_rate)

    def scores(sound: np.ndarray) -> dict[str, float]:
        found = score(torch.from_numpy(sound)[None], torch.from_numpy(target)[None])
        return {name: float(value) for name, value in found.items()}

    untouched = task.baseline(torch.from_numpy(inputs)[None])[0].numpy()
    result: dict[str, Any] = {"task": scores(estimate), "input": scores(untouched)}
    if task.stems:
        names = task.sources
        if not task.additive:
            # What is not asked for interferes too: it is one more source, as accompaniment is.
            names = (*names, REST)
            target, estimate = (
                np.concatenate([y, inputs[None] - y.sum(0)]) for y in (target, estimate)
            )
        found = score_track(target, estimate, track.sample_rate, names)
        result["bss"] = {name: found[name] for name in task.sources}
    return result


def task_for(task: Any, track: Track) -> Any:
    """The task as this track can serve it: shifted here, where the track has no such column."""
    if set(task.voices) <= set(track.voices) or not hasattr(task, "shift"):
        return task
    from bgray.data import public

    return type(task)(**{**public(task), "shift": "on_the_fly"})


def _check(trained: Any, tracks: list[Track], source: str) -> None:
    rate, problems = trained.experiment.data.sample_rate, []
    for track in tracks:
        lacking = set(task_for(trained.task, track).voices) - set(track.voices)
        if track.sample_rate != rate:
            problems.append((track.name, f"{track.sample_rate} Hz, but the run works at {rate}"))
        elif lacking:
            text = f"lacks {', '.join(sorted(lacking))}; there is {', '.join(track.voices)}"
            problems.append((track.name, text))
    if problems:
        raise ConfigError(source, problems)


def load_and_evaluate(
    url: str, track: Track, overlap: float, device: str, checkpoint: str
) -> dict[str, Any]:
    """`evaluate_track` in another process, which has the run to load."""
    import torch

    from bgray.inference import load

    return evaluate_track(load(url, torch.device(device), checkpoint), track, overlap)


def _on_ray(jobs: list[tuple[str, Track, float, str, str]]) -> list[dict[str, Any]]:
    """The same in tasks of their own, one to a CPU (and to a GPU, where the run is on one)."""
    from bgray.session import ray_session

    with ray_session() as ray:
        gpus = 1 if jobs[0][3] == "cuda" else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(load_and_evaluate)
        return ray.get([remote.remote(*job) for job in jobs])


# --- output


def finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(result: dict[str, Any]) -> None:
    """The medians as a table."""
    from rich.console import Console
    from rich.table import Table

    from bgray.bss import METRICS, median

    count = len(result["task"])
    run = "/".join(result["run"].split("/")[-2:])
    which = f"{run} after {result['step']} steps ({result['checkpoint']})"
    table = Table(title=f"{which}: medians over {count} tracks", title_justify="left")
    medians = result.get("bss_medians")
    if medians:
        for column in ("target", *METRICS):
            table.add_column(column, justify="right" if column != "target" else "left")
        for source, scores in medians.items():
            cells = ["-" if scores[m] is None else f"{scores[m]:.2f}" for m in METRICS]
            playing = sum(s[source]["uSDR"] is not None for s in result["bss"].values())
            label = source if playing == count else f"{source} ({playing} of {count})"
            table.add_row(label, *cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if medians:
        console.print(table)
        table = Table(title="the task's own scores", title_justify="left")
    names = list(dict.fromkeys(name for scores in result["task"].values() for name in scores))
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for label, key in (("estimate", "task"), (UNCHANGED, "input")):
        by_track = result[key].values()
        cells = [f"{median([s.get(n, math.nan) for s in by_track]):.4f}" for n in names]
        table.add_row(label, *cells)
    console.print(table)
    console.print(f"by track: {result['place']}", soft_wrap=True)


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Box plots by target of all runs, beside the first run's scores."""
    from bgray.boxplot import box_plot

    runs = {"/".join(u.split("/")[-2:]): r["bss"] for u, r in results.items() if "bss" in r}
    scores = next(iter(results.values()))["place"].removesuffix(".json")
    mark = "" if len(results) == 1 else f"-{digest(sorted(results))[:8]}"
    place = f"{scores.replace('/scores', '/boxplot')}{mark}.svg"
    storage.write_bytes(place, box_plot(runs))
    print(f"box plots: {place}")


if __name__ == "__main__":
    from bgray.evaluate import main  # so that Ray pickles load_and_evaluate by reference

    main()
