"""How well a separator could do with the mixture's phase, and which STFT window allows most (004).

python -m bgray.oracle sweeps/oracle.yaml [--dry] [--set oracle.key=value ...]
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bgray import plateau, storage, tracks
from bgray.config import digest
from bgray.document import override, read
from bgray.leases import held
from bgray.metrics import usdr
from bgray.problems import STRICT, ConfigError, Problem, validate
from bgray.records import read_lines
from bgray.tracks import Track

VERSION = 1  # of the scores in oracle.jsonl; raised when they would differ
BLOCK = 2**20  # samples of all sources that are transformed together: they stay in the cache
RAY_SECONDS = 20.0  # less work than this is done before Ray has started
TASK = 8  # scores of a track that are computed together, so that it is not read for each
SAVE_SECONDS = 5.0
TOLERANCE_DB = 0.02  # windows this close to the best are as good


@dataclass(frozen=True, config=STRICT)
class Oracle:
    """The `oracle:` section of a YAML file: the log's search, with the overlap as a dimension."""

    tracks: str = "builtin"
    """`builtin`, a folder of stem folders (MUSDB18-HQ: its `train`), or shards with stems, of
    which the validation split is taken."""
    subset: Literal["all", "musdb_validation"] = "all"
    """musdb_validation: the 14 tracks of MUSDB18's train half that the log had."""
    search: Literal["random", "grid"] = "random"
    seeds: tuple[int, ...] = (42, 1337)
    """One random search each, reported one by one; a window is scored once for all of them."""
    draws: int = Field(default=60, ge=1)
    """Windows per seed, drawn with replacement."""
    low: int = Field(default=256, ge=8)
    """Candidates, in samples: low, low + step, ... below high."""
    high: int = Field(default=32768, ge=9, le=2**20)
    step: int = Field(default=128, ge=1)
    noverlap_ratio: tuple[float, ...] = (0.25, 0.5, 0.75)
    """What neighbouring windows share. 0.25 is what the log computed (noverlap = N // 4); a hop of
    a quarter window, as its words read, is 0.75."""
    controls: tuple[int, ...] = (4096, 8192)
    """Windows that are always scored, to compare with."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Only the beginning of each track; null: all of it."""
    builtin_songs: int = Field(default=8, ge=2)
    builtin_seconds: float = Field(default=20.0, gt=0)
    results: str = "results"
    """Folder or s3:// prefix; writes <results>/<name>/oracle.jsonl and oracle.json."""


@dataclass(frozen=True, config=STRICT)
class Question:
    oracle: Oracle
    name: str = Field(default="oracle", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. +-]*$")


def main(argv: list[str] | None = None) -> None:
    from bgray.train import errors_in_one_line

    parser = argparse.ArgumentParser(
        prog="python -m bgray.oracle", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("question", help="YAML file with an `oracle:` section")
    parser.add_argument(
        "--dry", action="store_true", help="say what would be scored, start nothing"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. oracle.draws=8"
    )
    args = parser.parse_args(argv)
    with errors_in_one_line():
        raw = read(args.question)
        override(raw, tuple(args.set), args.question)
        sys.exit(run(raw, args.question, args.dry))


def run(raw: dict[str, Any], source: str, dry: bool) -> int:
    """Answer the question that a YAML file asks, given as plain data; scores that are there stay.

    dry: only say how much there is to do. Returns the exit code.
    """
    question = parse(raw, source)
    config, console = question.oracle, Console(width=None if sys.stdout.isatty() else 160)
    found = find_tracks(config, source)
    candidates = windows(config)
    url = storage.join(config.results, question.name)
    scores = read_scores(url)
    settings = [(window, ratio) for ratio in config.noverlap_ratio for window in candidates]
    tasks: list[Task] = []
    for track in found:
        missing = [pair for pair in settings if (content(track), *pair) not in scores]
        tasks += [(track, missing[i : i + TASK]) for i in range(0, len(missing), TASK)]
    minutes = sum(track.frames / track.sample_rate for track in found) / 60
    console.print(
        f"{len(found)} tracks ({minutes:.1f} min), {len(candidates)} windows, "
        f"{len(config.noverlap_ratio)} overlaps: {sum(len(pairs) for _, pairs in tasks)} of "
        f"{len(found) * len(settings)} scores to compute, in {url}",
        soft_wrap=True,
        highlight=False,
    )
    if dry:
        return 0
    with held(url, console.print, what=question.name, option="oracle.results"):
        scores |= read_scores(url)  # of a process that has just ended
        compute(tasks, scores, url, console)
    resting = {}
    for track in found:
        sdr = scores[content(track), *settings[0]]["sdr_db"]
        resting[track.name] = [stem for stem, value in sdr.items() if value is None]
    if all(len(resting[track.name]) == len(track.stems) for track in found):
        raise ConfigError(source, [("oracle.tracks", "no track in which two stems play")])
    overlaps = []
    for ratio in config.noverlap_ratio:
        rows = [[scores[content(t), w, ratio]["sdr_db"] for w in candidates] for t in found]
        summary = plateau.summarize(rows, candidates, config.controls, drawn(config), TOLERANCE_DB)
        overlaps.append({"noverlap_ratio": ratio, **summary})
    report = {"oracle": asdict(config), "resting": resting, "overlaps": overlaps}
    storage.write_bytes(storage.join(url, "oracle.json"), json.dumps(report, indent=1).encode())
    show(overlaps, len(found), console)
    for name, stems in resting.items():
        if stems:
            text = f"{name}: not scored, for they rest or play alone: {', '.join(stems)}"
            console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(f"in {url}", soft_wrap=True)
    return 0


# --- the question


def parse(raw: dict[str, Any], source: str) -> Question:
    """ConfigError with every problem at once."""
    question, problems = validate(Question, raw, "")
    if question is not None:
        problems = list(_conflicts(question.oracle))
    if problems or question is None:
        raise ConfigError(source, problems)
    return question


def _conflicts(config: Oracle) -> Iterator[Problem]:
    if config.low >= config.high:
        yield "oracle.low", f"must be below high = {config.high}, got {config.low}"
    if config.search == "random" and not config.seeds:
        yield "oracle.seeds", "is empty; give one, or set search: grid"
    if not config.noverlap_ratio:
        yield "oracle.noverlap_ratio", "is empty; give one, e.g. 0.25"
    for i, ratio in enumerate(config.noverlap_ratio):
        if not 0 < ratio < 1 or int(config.low * ratio) < 1:
            text = "must be above 0, for Hann windows that do not overlap lose what lies between"
            yield f"oracle.noverlap_ratio[{i}]", f"{text} them, and below 1, got {ratio:g}"
    for i, window in enumerate(config.controls):
        if not 8 <= window <= 2**20:
            yield f"oracle.controls[{i}]", f"must be 8 to {2**20} samples, got {window}"
    if config.subset == "musdb_validation" and config.tracks == "builtin":
        yield "oracle.subset", "musdb_validation needs tracks: the folder of MUSDB18-HQ's train"


def draws(
    seed: int, num: int = 60, *, low: int = 256, high: int = 32768, step: int = 128
) -> list[int]:
    """The windows that a seed draws, in order: the log's script, draw by draw."""
    rng = random.Random(seed)
    candidates = range(low, high, step)
    return [rng.choice(candidates) for _ in range(num)]


def drawn(config: Oracle) -> dict[int, list[int]]:
    """Seed to its windows; empty for a grid."""
    if config.search == "grid":
        return {}
    limits = {"low": config.low, "high": config.high, "step": config.step}
    return {seed: draws(seed, config.draws, **limits) for seed in config.seeds}


def windows(config: Oracle) -> list[int]:
    """Every window to score, ascending."""
    searched = sum(drawn(config).values(), []) or range(config.low, config.high, config.step)
    return sorted({*searched, *config.controls})


def find_tracks(config: Oracle, source: str) -> list[Track]:
    if config.tracks == "builtin":
        found = tracks.builtin(config.builtin_songs, seconds=config.builtin_seconds)
    else:
        found = tracks.find(config.tracks)
    if config.subset == "musdb_validation":
        wanted = tracks.musdb_validation()
        by_title = {track.name.rsplit("/", 1)[-1]: track for track in found}
        if missing := [title for title in wanted if title not in by_title]:
            text = (
                f"{len(missing)} of MUSDB's 14 validation tracks are not there: {missing[0]}, ..."
            )
            raise ConfigError(source, [("oracle.tracks", f"{text} in {config.tracks}")])
        found = [by_title[title] for title in wanted]
    stems = found[0].stems
    problems = [
        ("oracle.tracks", f"{track.name} has the stems {', '.join(track.stems) or 'none'}")
        for track in found
        if track.stems != stems or len(stems) < 2
    ]
    if problems:
        text = f"all tracks need the same stems, two or more; {found[0].name} has {len(stems)}"
        raise ConfigError(source, [*problems[:5], ("oracle.tracks", text)])
    return [track.head(config.max_seconds) for track in found]


# --- the oracle


def phase_mix(sources: torch.Tensor, window: int, noverlap_ratio: float = 0.25) -> torch.Tensor:
    """Sources (S, C, T) with their own magnitudes and the phase of their sum -> (S, C, T).

    Equal to `scipy.signal.stft` (Hann, zeros beyond both ends), |S_j| X / |X| with X = 1e-10 +
    the sum of the S_j, and `scipy.signal.istft`, in the precision of `sources`.
    """
    num, channels, length = sources.shape
    hop = window - int(window * noverlap_ratio)
    frames, overlapping = 1 + -(-length // hop), -(-window // hop)
    hann = torch.hann_window(window, dtype=sources.dtype, device=sources.device)
    padded = sources.new_zeros(num, channels, (frames - 1) * hop + window)
    padded[..., window // 2 : window // 2 + length] = sources
    cut = padded.unfold(-1, window, hop)  # (S, C, N, window), a view
    # Row r of `out` is samples r*hop to (r+1)*hop, so that a frame is added in `overlapping` rows.
    out = sources.new_zeros(num, channels, frames + overlapping - 1, hop)
    weight = sources.new_zeros(frames + overlapping - 1, hop)
    per_block = max(1, BLOCK // (num * channels * window))
    for start in range(0, frames, per_block):
        spectrum = torch.fft.rfft(cut[:, :, start : start + per_block] * hann)  # (S, C, n, F)
        # scipy's STFT is divided by the window's sum; ours is not, so its 1e-10 is multiplied.
        mixture = spectrum.sum(0) + 1e-10 * hann.sum()
        level = mixture.abs()
        phase = torch.where(level == 0, 1, mixture / level.clamp(min=1e-35))
        made = torch.fft.irfft(spectrum.abs() * phase, n=window) * hann  # (S, C, n, window)
        stop = start + made.shape[2]
        for row in range(overlapping):
            piece = made[..., row * hop : (row + 1) * hop]
            out[:, :, start + row : stop + row, : piece.shape[-1]] += piece
    for row in range(overlapping):
        piece = hann[row * hop : (row + 1) * hop].square()
        weight[row : row + frames, : piece.shape[-1]] += piece
    out /= torch.where(weight > 1e-10, weight, 1)
    return out.flatten(2)[..., window // 2 : window // 2 + length]


Key = tuple[str, int, float]
"""A track's content, the window, the overlap."""
Row = dict[str, Any]
Task = tuple[Track, list[tuple[int, float]]]
"""A track and the (window, overlap) pairs to score."""


def score(track: Track, settings: Sequence[tuple[int, float]]) -> list[Row]:
    """The lines of oracle.jsonl for one track: uSDR in dB by stem; null where a stem rests, or
    plays alone, for then the oracle is perfect with any window."""
    sources = torch.from_numpy(track.load(track.stems))  # (S, C, T)
    plays = sources.flatten(1).any(1)
    plays &= plays.sum() > 1
    rows = []
    for window, ratio in settings:
        sdr = usdr(phase_mix(sources, window, ratio), sources)
        by_stem = zip(track.stems, sdr.tolist(), plays.tolist(), strict=True)
        rows.append(
            {
                "content": content(track),
                "track": track.name,
                "window": window,
                "noverlap_ratio": ratio,
                "sdr_db": {stem: value if there else None for stem, value, there in by_stem},
            }
        )
    return rows


def content(track: Track) -> str:
    """Of everything about a track that its scores depend on."""
    return digest([VERSION, track.content, track.frames, track.stems])[:16]


# --- the work


def read_scores(url: str) -> dict[Key, Row]:
    rows = read_lines(storage.join(url, "oracle.jsonl"))
    return {(row["content"], row["window"], row["noverlap_ratio"]): row for row in rows}


def compute(tasks: list[Task], scores: dict[Key, Row], url: str, console: Console) -> None:
    """Add what is missing to `scores` and to oracle.jsonl; stopped, it keeps what it has."""
    from bgray.console import bar

    saved, done, total = time.monotonic(), 0, sum(len(pairs) for _, pairs in tasks)

    def save() -> None:
        lines = "".join(json.dumps(row) + "\n" for row in scores.values())
        storage.write_bytes(storage.join(url, "oracle.jsonl"), lines.encode())

    with bar(console, "scoring") as progress:
        try:
            for rows in _scored(tasks):
                scores |= {(r["content"], r["window"], r["noverlap_ratio"]): r for r in rows}
                done += len(rows)
                progress(done, total)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            if done:
                save()


def _scored(tasks: list[Task]) -> Iterator[list[Row]]:
    """Here, or on Ray when the first task says that all of them will take long."""
    started = time.perf_counter()
    for task in tasks[:1]:
        yield score(*task)
    if (time.perf_counter() - started) * len(tasks[1:]) < RAY_SECONDS:
        yield from (score(*task) for task in tasks[1:])
        return
    from bgray.session import ray_session

    with ray_session() as ray:
        remote = ray.remote(num_cpus=1)(score)
        waiting = [remote.remote(*task) for task in tasks[1:]]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)


# --- the answer


def show(overlaps: list[dict[str, Any]], num_tracks: int, console: Console) -> None:
    """A table for each overlap, and what it comes to."""
    for found in overlaps:
        per_target, single, gain = found["per_target"], found["single"], found["gain_over_single"]
        stems = list(per_target)
        title = f"overlap {found['noverlap_ratio']:g}: SDR in dB, means over {num_tracks} tracks"
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("window")
        for name in (*stems, "mean of targets"):
            table.add_column(escape(name), justify="right", no_wrap=True)

        def line(name: str, cells: Iterable[str], table: Table = table) -> None:
            table.add_row(name, *cells)

        for window, scores in found["controls"].items():
            line(f"{window} (control)", (f"{v:.3f}" for v in scores.values()))
        scores = single["by_target"]
        line(f"{single['window']} (best for all)", (f"{v:.3f}" for v in scores.values()))
        best = [f"{f['sdr_db']:.3f} at {f['window']}" for f in per_target.values()]
        line("best per target", [*best, f"{scores['mean'] + gain['mean']:.3f}"])
        every = [*per_target.values(), single]
        line("as good as the best", ("{} to {}".format(*f["as_good"]) for f in every))
        line("worst to best track", ("{:.2f} to {:.2f}".format(*f["tracks_db"]) for f in every))
        for seed, f in found["seeds"].items():
            line(f"seed {seed}", (f"{v['sdr_db']:.3f} at {v['window']}" for v in f.values()))
        console.print(table)
        low, high = gain["mean_interval"]
        console.print(
            f"A window per target instead of {single['window']} gains {gain['mean']:.3f} dB, the "
            f"mean over {len(stems)} targets (95% of resampled tracks: {low:.3f} to {high:.3f}): "
            + ", ".join(f"{stem} {gain[stem]:+.3f}" for stem in stems),
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        "`As good`: within 0.02 dB, or not told apart by these tracks. The sum of the targets' "
        "gains, which log 004 calls the total gain, is nothing that any score rises by: do not "
        "quote it.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    from bgray.oracle import main  # so that Ray pickles bgray.oracle.*, not __main__.*

    main()
