"""Which files of a source belong together: one file each, a track's stems, a built-in song.

With stems, a folder that holds audio is a track and its files are the stems, as in MUSDB18-HQ; a
`mixture.*` among them is ignored, because `audio` is made as the stems' sum. Folders above are part
of the name: under a root that holds `train` and `test`, tracks are `train/<title>`, and are put in
the splits by `validation_groups` like all others. A `metadata.yaml` beside a folder `stems` makes
it a track of Slakh, whose stems are put together by instrument.
"""

import dataclasses
import difflib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from bgray import storage
from bgray.config import ConfigError
from bgray.instruments import DRUMS, column
from bgray.shards import PLAIN_COLUMNS, Options

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
MIDI_SUFFIXES = (".mid", ".midi")
RESERVED = (*PLAIN_COLUMNS, "audio", "roll")
RESERVED_BEGINNINGS = ("shift_", "roundtrip_")
SLAKH_STEMS, SLAKH_METADATA = "stems", "metadata.yaml"


@dataclass(frozen=True)
class Part:
    """One file of sound, or MIDI."""

    path: str
    name: str
    """The source folder's relative path to it, printable."""
    stem: str
    size: int
    stamp: str
    """Changes when the content does: modification time or ETag."""


@dataclass(frozen=True)
class Item:
    """Used or rejected as a whole: a file, a track's stems, or a built-in song (no parts)."""

    key: str
    group: str
    parts: tuple[Part, ...]
    song: int = -1
    left_out: tuple[str, ...] = ()
    """Stems that its metadata says were never rendered."""


def list_items(source: str, options: Options) -> tuple[list[Item], dict[str, str], int]:
    """(items ordered by key, reasons against others, number of files of other kinds)."""
    if source == "builtin":
        _try_the_band(options)
        keys = [f"song-{index:05}" for index in range(options.songs)]
        return [Item(key, key, (), index) for index, key in enumerate(keys)], {}, 0
    files = sorted(
        _remote(source) if storage.is_remote(source) else _local(source), key=lambda part: part.name
    )
    audio = [part for part in files if suffix(part.name) in AUDIO_SUFFIXES]
    midi = [part for part in files if suffix(part.name) in MIDI_SUFFIXES]
    # Slakh's tracks have the MIDI files that they were made from beside their sound.
    wanted = midi if options.kind == "roll" or options.stems and not audio else audio
    if not wanted:
        raise ConfigError(source, [("", _nothing(files, options))])
    if options.stems and wanted is audio:
        items, rejected = _tracks(audio, files, options)
    else:
        items, rejected = [_file(part, options) for part in wanted], {}
    return items, rejected, len(files) - len(wanted)


def _try_the_band(options: Options) -> None:
    """What the band cannot play, it says at the first note."""
    from bgray import band

    seconds = min(1.0, options.seconds)
    try:
        if options.kind == "roll":
            band.compose(np.random.default_rng(options.seed), seconds, tuple(band.PROGRAMS))
        else:
            band.song(options.seed, 0, seconds=seconds, sample_rate=options.sample_rate)
    except ValueError as error:
        raise ConfigError("built-in music", [("", str(error))]) from None


def _nothing(files: list[Part], options: Options) -> str:
    counts = Counter(suffix(part.name) or "without suffix" for part in files)
    there = ", ".join(f"{count} {name}" for name, count in counts.most_common(5)) or "nothing"
    if options.kind == "roll":
        return f"no MIDI found (looked for {', '.join(MIDI_SUFFIXES)}); there: {there}"
    text = f"no audio found (looked for {', '.join(AUDIO_SUFFIXES)}); there: {there}"
    has_midi = any(name in counts for name in MIDI_SUFFIXES)
    return text + "; for MIDI files give --rolls or --stems" * has_midi


def _file(part: Part, options: Options) -> Item:
    return Item(part.name, _parent(part.name) if options.group == "folder" else part.name, (part,))


def _tracks(
    audio: list[Part], files: list[Part], options: Options
) -> tuple[list[Item], dict[str, str]]:
    folders = defaultdict(list)
    for part in audio:
        folders[_parent(part.name)].append(part)
    metadata = {_parent(p.name): p for p in files if p.name.rsplit("/", 1)[-1] == SLAKH_METADATA}
    slakh = {_parent(f) for f in folders if f.rpartition("/")[2] == SLAKH_STEMS} & metadata.keys()
    items, rejected = [], {}
    for folder, parts in folders.items():
        if folder in slakh:  # holds the mix alone
            continue
        of_slakh = folder.rpartition("/")[2] == SLAKH_STEMS and _parent(folder) in slakh
        key = _parent(folder) if of_slakh else folder
        try:
            if of_slakh:
                stems, left_out = _by_instrument(parts, metadata[key])
            else:
                stems, left_out = _by_name(parts, folder in metadata), ()
        except ValueError as error:
            rejected[key] = str(error)
            continue
        group = _parent(key) if options.group == "folder" else key
        items.append(Item(key, group, stems, left_out=left_out))
    return items, rejected


def _by_name(parts: list[Part], has_metadata: bool) -> tuple[Part, ...]:
    """The stems of a track; ValueError where there are none or their names do not fit."""
    mixtures = ("mixture", "mix") if has_metadata else ("mixture",)  # mix.flac is Slakh's
    stems = tuple(part for part in parts if part.stem not in mixtures)
    counts = Counter(part.stem for part in stems)
    reserved = [n for n in counts if n in RESERVED or n.startswith(RESERVED_BEGINNINGS)]
    if not stems:
        raise ValueError("a mixture without stems")
    if reserved:
        raise ValueError(f"a stem cannot be called '{reserved[0]}'; rename the file")
    if max(counts.values()) > 1:
        raise ValueError(f"two files are stem '{counts.most_common(1)[0][0]}'")
    return stems


def _by_instrument(parts: list[Part], metadata: Part) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """(a Slakh track's files, each as the stem of its instrument; stems that were never rendered).

    Several files may be of one stem: they are added up. ValueError where the metadata says other
    than what is there.
    """
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        listed = yaml.load(storage.read_bytes(metadata.path), loader)["stems"]
        rendered = {name: about.get("audio_rendered", True) for name, about in listed.items()}
        columns = {
            name: column(DRUMS if about.get("is_drum") else int(about["program_num"]))
            for name, about in listed.items()
        }
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{SLAKH_METADATA}: not that of a Slakh track ({text})") from None
    there = {part.stem: part for part in parts}
    if missing := [name for name in columns if rendered[name] and name not in there]:
        raise ValueError(
            f"{SLAKH_METADATA} lists {missing[0]}, but stems/{missing[0]}.* is missing"
        )
    if unknown := sorted(there.keys() - columns.keys()):
        raise ValueError(f"stems/{unknown[0]}.* is not in {SLAKH_METADATA}")
    stems = []
    for part in parts:
        stem = columns[part.stem]  # in the stamp too: it decides what the shards hold
        stems.append(dataclasses.replace(part, stem=stem, stamp=f"{part.stamp} {stem}"))
    return tuple(stems), tuple(name for name in columns if name not in there)


def _local(source: str) -> Iterator[Part]:
    root = Path(source)
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        close = difflib.get_close_matches(root.name, near, 1)
        hint = (
            f"; did you mean {root.parent / close[0]}?"
            if close
            else "; give the folder that holds the audio"
        )
        raise ConfigError(source, [("", ("a file" if root.exists() else "no such folder") + hint)])

    def fail(error: OSError) -> None:
        raise ConfigError(source, [("", f"cannot list {error.filename}: {error.strerror}")])

    seen = set()
    # Linked folders are common in data sets; `seen` ends a link to a folder above itself.
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(folder, name)
            if (
                not name.startswith(".") and path.is_file()
            ):  # ._song.wav is a Mac's note about song.wav
                stat = path.stat()
                yield _part(
                    str(path),
                    path.relative_to(root).as_posix(),
                    stat.st_size,
                    str(stat.st_mtime_ns),
                )


def _remote(source: str) -> Iterator[Part]:
    try:
        with storage.plain_errors(source):
            fs, root = storage.filesystem(source)
            found = dict(fs.find(root, detail=True))
    except OSError as error:
        raise ConfigError(source, [("", f"cannot list it: {error}")]) from None
    for path, info in found.items():
        name = path.removeprefix(root).lstrip("/")
        if info["type"] == "file" and not any(piece.startswith(".") for piece in name.split("/")):
            yield _part(
                fs.unstrip_protocol(path),
                name,
                info["size"],
                str(info.get("ETag", info.get("mtime", ""))),
            )


def _part(path: str, name: str, size: int, stamp: str) -> Part:
    # A file name may hold bytes that are not UTF-8; Parquet and JSON cannot.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return Part(path, name, name.rsplit("/", 1)[-1].rsplit(".", 1)[0], size, stamp)


def suffix(name: str) -> str:
    """Of a file, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def _parent(name: str) -> str:
    return name.rsplit("/", 1)[0] if "/" in name else "."
