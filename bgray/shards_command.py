"""The command line of `bgray.shards`: prepare, list or verify, and say what came of it."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bgray import shards, storage
from bgray.config import ConfigError
from bgray.shards import ROLL_CHANNELS, ROLL_RATE, Manifest

SPLITS = ("train", "validation")
ROLL_SONG_SECONDS = 96.0  # 1 to 3 pieces, by tempo
Rows = list[tuple[str, ...]]
Progressed = Callable[[int, int], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits 1 with one message where something is wrong, 130 when interrupted."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.list or args.verify:
        if args.places:
            parser.error("--list and --verify take one folder and nothing else")
    elif len(args.places) != 2:
        parser.error("expected SOURCE and DESTINATION, or --list or --verify with a folder")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers: must be 0 or more, got {args.workers}")
    console = Console(highlight=False, soft_wrap=True)
    try:
        if args.list:
            _show(console, _listing(shards.read_manifest(args.list)))
        elif args.verify:
            with _bar(console) as progress:
                problems = shards.verify(args.verify, progress)
            if problems:
                raise ConfigError(args.verify, [("", problem) for problem in problems])
            console.print(f"{args.verify}: every shard is as the manifest says", markup=False)
        else:
            _prepare(args, console)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        text = "stopped; run the same command again to go on: finished shards are kept"
        print(text, file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    default, name = shards.Options(), shards.COMMAND
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} SOURCE DESTINATION [options]\n"
        f"       {name} --list FOLDER\n       {name} --verify FOLDER",
        description="Write audio files, stems, MIDI files or built-in music as shards. "
        "Run again, it goes on where it stopped.",
    )
    places = "folders or s3:// prefixes; SOURCE may be: builtin"
    add = parser.add_argument
    add("places", nargs="*", metavar="SOURCE DESTINATION", help=places)
    add("--list", metavar="FOLDER", help="show what a folder of shards holds")
    add("--verify", metavar="FOLDER", help="read and decode all of it, name what is corrupt")
    add(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help=f"of sound; {default.sample_rate} if not given",
    )
    add("--channels", type=int, metavar="N", help=f"of sound; {default.channels} if not given")
    several: dict[str, Any] = {"type": float, "nargs": "+", "action": "extend", "default": []}
    add("--shift", **several, metavar="SEMITONES", help="add voices shifted by them")
    add("--round-trip", **several, metavar="SEMITONES", help="add voices shifted there and back")
    add(
        "--stems",
        action="store_true",
        help="a voice for each stem: one folder a track, one file a stem (MUSDB18-HQ's drums.wav; "
        "mixture.* is ignored), Slakh's folders, or MIDI files played by fluidsynth",
    )
    add("--soundfont", default="", metavar="FILE", help="plays the MIDI files; .sf2 or .sf3")
    add(
        "--rolls",
        action="store_true",
        help="MIDI files, or built-in songs, as piano rolls: pieces of 80 beats, 24 steps a beat",
    )
    add("--group", choices=("file", "folder"), default=default.group, help="kept in one split")
    add("--validation", type=float, default=default.validation, metavar="SHARE", help="of groups")
    add("--validation-groups", default="", metavar="A,B", help="exactly these instead")
    add(
        "--max-rejected", type=float, default=default.max_rejected, metavar="SHARE", help="of files"
    )
    add("--upsample", action="store_true", help="accept files of far lower rate than --sample-rate")
    add("--min-seconds", type=float, default=default.min_seconds, metavar="S")
    add("--songs", type=int, default=default.songs, metavar="N", help="of built-in music")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help=f"of a built-in song; {default.seconds:g}, as rolls {ROLL_SONG_SECONDS:g}",
    )
    add("--seed", type=int, default=default.seed, metavar="N", help="of the built-in songs")
    add("--workers", type=int, metavar="N", help="Ray Data tasks at a time; 0: this process only")
    return parser


def _prepare(args: argparse.Namespace, console: Console) -> None:
    values = {**vars(args), "shifts": tuple(args.shift), "round_trips": tuple(args.round_trip)}
    values["validation_groups"] = tuple(name for name in args.validation_groups.split(",") if name)
    if args.rolls:
        rolls = {"sample_rate": ROLL_RATE, "channels": ROLL_CHANNELS, "seconds": ROLL_SONG_SECONDS}
        values |= {"kind": "roll"} | {k: v for k, v in rolls.items() if values[k] is None}
    names = [field.name for field in dataclasses.fields(shards.Options)]
    given = {name: values[name] for name in names if values.get(name) is not None}
    options = shards.Options(**given)
    source, destination = args.places
    there = storage.exists(shards.manifest_url(destination))
    with _bar(console) as progress:
        manifest = shards.prepare(
            source, destination, options, workers=args.workers, progress=progress
        )
    if there:
        console.print(f"{destination}: already complete", markup=False)
    for title, entries in (("rejected", manifest.rejected), ("duplicate", manifest.duplicates)):
        for entry in entries[:10]:
            console.print(f"{title}: {entry['path']}: {entry['reason']}", markup=False)
        if entries[10:]:
            console.print(f"... and {len(entries) - 10} more {title}, all in the manifest")
    _show(console, _summary(manifest))
    console.print(f"voices: {', '.join(manifest.voices)}", markup=False)
    if manifest.kind == "roll":
        densities = [f"{split} {manifest.density(split):.4f}" for split in SPLITS]
        console.print(f"note density (the error of predicting silence): {', '.join(densities)}")
    else:
        resampled = sum(file["source_rate"] != manifest.sample_rate for file in manifest.files)
        console.print(
            f"{resampled} of {len(manifest.files)} files resampled to {manifest.sample_rate} Hz"
        )
    if played_with := manifest.options.get("played_with"):
        console.print(f"MIDI played with {played_with}", markup=False)
    if left_out := sum(len(file.get("left_out", ())) for file in manifest.files):
        console.print(f"{left_out} stems left out, which the metadata says were never rendered")
    if scaled := sum(file.get("gain_db", 0.0) < 0 for file in manifest.files):
        console.print(f"{scaled} files scaled down to avoid clipping")
    console.print(
        f"{len(manifest.rejected)} rejected, {len(manifest.duplicates)} duplicates, "
        f"{manifest.ignored} files of other kinds"
    )
    console.print(f"manifest: {shards.manifest_url(destination)}", markup=False)


def _summary(manifest: Manifest) -> Rows:
    # A roll's rate is in steps a beat, so what is seconds elsewhere is beats.
    unit, per_unit = ("beats", 1) if manifest.kind == "roll" else ("hours", 3600)
    table: Rows = [("split", "files", "groups", unit, "chunks", "shards", "MB")]
    for split in SPLITS:
        files = [file for file in manifest.files if file["split"] == split]
        groups = {file["group"] for file in files}
        sizes = [shard.bytes for shard in manifest.shards if shard.split == split]
        length, megabytes = manifest.seconds(split) / per_unit, sum(sizes) / 1e6
        length = f"{length:.0f}" if unit == "beats" else f"{length:.3f}"
        counts = map(str, (len(files), len(groups), length, manifest.rows(split), len(sizes)))
        table.append((split, *counts, f"{megabytes:.1f}"))
    return table


def _listing(manifest: Manifest) -> Rows:
    table: Rows = [("shard", "split", "rows", "row groups", "MB", "sha256")]
    for s in manifest.shards:
        size = f"{s.bytes / 1e6:.1f}"
        table.append((s.name, s.split, str(s.rows), str(s.row_groups), size, s.sha256[:8]))
    names = ("rows", "row_groups", "bytes")
    rows, groups, size = (sum(getattr(s, name) for s in manifest.shards) for name in names)
    return [*table, ("total", "", str(rows), str(groups), f"{size / 1e6:.1f}", manifest.hash[:8])]


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Progressed]:
    """A function of (done, total) that moves a bar; nothing is drawn into a pipe."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("shards", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _show(console: Console, rows: Rows) -> None:
    """The first row is the header. Tab-separated into a pipe, for cut and grep."""
    if console.is_terminal:
        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        return
    for row in rows:
        print(*row, sep="\t", file=console.file)
