"""The shard format: write, read, list, verify.

A folder (or s3:// prefix) of `train-00000.parquet`, `validation-00000.parquet`, ... and
`manifest.json`, which is written last: without it the folder is unfinished. A row is one aligned
chunk of about 10 s (of 5 to 15); each voice (`audio`, its shifted variants, stems) is a `binary`
column holding a FLAC-16 file of it. Eight rows make a row group, which is what gets read at once.
Or a row is 1920 steps of a piano roll as packed bits (voice `roll`): 88 channels at a "rate" of 24
steps a beat, so that what is seconds elsewhere is beats there.
`python -m bgray.shards SOURCE DESTINATION` writes such a folder (the work is in `bgray.ingest`).
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bgray import storage
from bgray.config import ConfigError, digest
from bgray.encoding import ROLL_MAGIC, Corrupt, decode_flac, decode_roll, encode_flac, encode_roll

VERSION = 1
CHUNK_SECONDS = 10.0
ROLL_BEATS, ROLL_RATE, ROLL_CHANNELS = 80.0, 24, 88  # a row's beats, steps a beat, piano keys
ROW_GROUP_SIZE = 8  # about 4.5 MB of mono pairs: one good-sized read from S3
PLAIN_COLUMNS = ("key", "group", "start", "frames")  # every other column is a voice
COMMAND = "python -m bgray.shards"
ENCODINGS = {"audio": "flac", "roll": "packed-bits"}  # by kind, as in the manifest
# What pyarrow raises over broken bytes, besides an OSError with one of these words.
BROKEN = (pa.ArrowException, UnicodeDecodeError, KeyError)
BROKEN_WORDS = re.compile(r"thrift|parquet|\bpage\b|end of stream|column|decod", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """How shards are made from a source. Everything but `max_rejected` decides what is in them."""

    kind: Literal["audio", "roll"] = "audio"
    """roll: MIDI files as piano rolls; needs sample_rate 24 and channels 88."""
    sample_rate: int = 48000
    """Hz; sources of another rate are resampled, and the summary says how many."""
    channels: int = 1
    """1 mixes down to mono; 2 doubles mono sources."""
    shifts: tuple[float, ...] = ()
    """Semitones; each adds a voice `shift_<semitones>`, made from the file before it is cut."""
    round_trips: tuple[float, ...] = ()
    """Semitones; each adds a voice `roundtrip_<semitones>`: shifted by them and back again."""
    stems: bool = False
    """A voice per stem, and `audio` is their sum. One folder a track, one file a stem; Slakh's
    folders, by instrument; or MIDI files, each instrument played by fluidsynth."""
    soundfont: str = ""
    """The .sf2 or .sf3 file that MIDI is played with; empty: what the system has."""
    group: Literal["file", "folder"] = "file"
    """What may not be in both splits: a file (a track), or all of a folder (a speaker)."""
    validation: float = 0.1
    """Share of the groups kept for validation, 0 to 1."""
    validation_groups: tuple[str, ...] = ()
    """Exactly these groups are validation; replaces the share."""
    max_rejected: float = 0.1
    """Share of unusable files, 0 to 1, above which nothing is published."""
    upsample: bool = False
    """Accept sources below 0.9 of the sample rate, whose upper spectrum stays empty."""
    min_seconds: float = 0.5
    songs: int = 48
    """Built-in music only."""
    seconds: float = 20.0
    """Length of a built-in song; from 70 on each has a whole row of roll, however slow it is."""
    seed: int = 0
    """Of the built-in songs."""

    def __post_init__(self):
        is_roll = self.kind == "roll"
        limits = {
            "sample_rate": (ROLL_RATE,) * 2 if is_roll else (1000, 655_350),  # FLAC's largest
            "channels": (ROLL_CHANNELS,) * 2 if is_roll else (1, 8),
            "validation": (0, 1),
            "max_rejected": (0, 1),
            "min_seconds": (0, float("inf")),
            "songs": (2, float("inf")),
            "seed": (0, float("inf")),
        }
        problems = [
            (name, f"must be {low:g} to {high:g}, got {getattr(self, name)!r}")
            for name, (low, high) in limits.items()
            if not low <= getattr(self, name) <= high
        ]
        for name, choices in (("kind", ("audio", "roll")), ("group", ("file", "folder"))):
            if (value := getattr(self, name)) not in choices:
                problems.append((name, f"must be {' or '.join(choices)}, got {value!r}"))
        for name, values in (("shift", self.shifts), ("round trip", self.round_trips)):
            in_range = all(0 < abs(by) <= 24 for by in values)  # NaN is not
            if not in_range or len(set(values)) < len(values):
                problems.append((name, f"must be -24 to 24, not 0, each once, got {values}"))
        for name in ("shifts", "round_trips", "stems", "soundfont", "upsample"):
            if is_roll and getattr(self, name):
                problems.append((name, "is about sound; piano rolls have none"))
        if problems:
            raise ConfigError("shards", problems)

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Voices that are computed from `audio`: name to how, as in the manifest."""
        voices = {f"shift_{by:g}": {"of": "audio", "semitones": float(by)} for by in self.shifts}
        for by in self.round_trips:
            how = {"of": "audio", "semitones": float(by), "round_trip": True}
            voices[f"roundtrip_{by:g}"] = how
        return voices


@dataclass(frozen=True)
class Row:
    """One chunk as stored."""

    key: str
    """The source file's path below the source folder."""
    group: str
    start: int
    """Samples from the beginning of the file."""
    frames: int
    voices: dict[str, bytes]
    """As stored, not decoded: FLAC files or packed piano rolls."""
    place: str = dataclasses.field(default="", compare=False)
    """Where it was read, for messages: `<url>/<shard>, row group <index>`."""


@dataclass(frozen=True)
class Shard:
    name: str
    split: str
    rows: int
    row_groups: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of shards, and where it came from."""

    sample_rate: int
    channels: int
    voices: dict[str, str]
    """Name to encoding."""
    variants: dict[str, dict[str, Any]]
    """Voices computed from another: `{"shift_12": {"of": "audio", "semitones": 12.0}}`."""
    files: list[dict[str, Any]]
    rejected: list[dict[str, str]]
    duplicates: list[dict[str, str]]
    ignored: int
    """Files that are neither sound nor, where MIDI was looked for, MIDI."""
    shards: tuple[Shard, ...]
    options: dict[str, Any]
    plan: str
    """Hash of the source listing and the options: the same plan is the same data."""
    chunk_seconds: float = CHUNK_SECONDS
    version: int = VERSION

    @functools.cached_property
    def hash(self) -> str:
        """Of everything that determines the data; where it lies and where it came from do not."""
        shards = [(s.name, s.split, s.rows, s.sha256) for s in self.shards]
        return digest(
            [self.version, self.sample_rate, self.channels, self.chunk_seconds, self.voices, shards]
        )

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.shards if shard.split == split)

    def seconds(self, split: str) -> float:
        return sum(file["seconds"] for file in self.files if file["split"] == split)

    @property
    def kind(self) -> str:
        return "roll" if "roll" in self.voices else "audio"

    def density(self, split: str) -> float:
        """Share of ones in a split's rolls: what predicting silence has as squared error."""
        ones = sum(file["ones"] for file in self.files if file["split"] == split)
        return ones / max(1.0, self.seconds(split) * self.sample_rate * self.channels)

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        raw = json.loads(data)
        return cls(**{**raw, "shards": tuple(Shard(**shard) for shard in raw["shards"])})


def prepare(
    source: str,
    destination: str,
    options: Options,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write shards of `source` (folder, s3:// prefix or `builtin`); at once if they are there.

    Interrupted, the same call goes on with the unfinished shards. Destinations holding shards of
    other sources or options are a ConfigError. On a cluster every node must reach both places.

    workers: Ray Data tasks at a time; None: as many as there are CPUs; 0: in this process. The
    bytes are the same.
    progress: called with (shards done, shards in all).
    """
    from bgray import ingest

    return ingest.prepare(source, destination, options, workers=workers, progress=progress)


# --- one file -------------------------------------------------------------------------------------


def encode_voice(voice: np.ndarray, sample_rate: int, kind: str) -> bytes:
    """int16 (C, T) -> bytes as the manifest names them."""
    return encode_roll(voice) if kind == "roll" else encode_flac(voice, sample_rate)


def _decode(stored: bytes) -> np.ndarray:
    return decode_roll(stored) if stored.startswith(ROLL_MAGIC) else decode_flac(stored)


def decode_voice(row: Row, voice: str) -> np.ndarray:
    """One voice of a row -> int16 (C, T); ConfigError with the row's place where it is corrupt."""
    try:
        return _decode(row.voices[voice])
    except Corrupt as error:
        text = (
            f"chunk {row.key} @{row.start}, voice {voice}: corrupt ({error}); "
            f"check with {COMMAND} --verify {row.place.rpartition('/')[0]}"
        )
        raise ConfigError(row.place, [("", text)]) from error


def encode_shard(rows: Sequence[Row], voices: Sequence[str]) -> bytes:
    """A Parquet file; the same rows give the same bytes."""
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "group": pa.array([row.group for row in rows], pa.string()),
        "start": pa.array([row.start for row in rows], pa.int64()),
        "frames": pa.array([row.frames for row in rows], pa.int64()),
    }
    for voice in voices:
        columns[voice] = pa.array([row.voices[voice] for row in rows], pa.binary())
    file = io.BytesIO()
    # Groups of even size: a lone chunk in the last one would be drawn eight times as often.
    num_groups = max(1, math.ceil(len(rows) / ROW_GROUP_SIZE))
    # Voices cannot be compressed again; dictionaries and statistics of audio would double the file.
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=max(1, math.ceil(len(rows) / num_groups)),
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    return file.getvalue()


def read_row_group(
    url: str, shard_name: str, index: int, voices: Sequence[str] | None = None
) -> list[Row]:
    """The rows of one row group: about eight chunks.

    A corrupt or missing shard is a ConfigError; OSErrors of the disk, the network or S3 pass.

    voices: which to read; None: all; (): only the plain columns.
    """
    target = storage.join(url, shard_name)
    try:
        if not storage.is_remote(target):
            with pq.ParquetFile(target, memory_map=True) as file:
                return _rows(file, index, voices, target)
        with storage.open_file(target) as handle:
            return _rows(pq.ParquetFile(handle, pre_buffer=True), index, voices, target)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unusable(url, target, "missing") from error
    except BROKEN as error:
        raise _unusable(url, target, str(error)) from error
    except OSError as error:
        if error.errno is None and BROKEN_WORDS.search(str(error)):
            raise _unusable(url, target, str(error)) from error
        raise


def _unusable(url: str, target: str, reason: str) -> ConfigError:
    text = f"cannot be read ({' '.join(reason.split())}); check with {COMMAND} --verify {url}"
    return ConfigError(target, [("", text)])


def _rows(file: pq.ParquetFile, index: int, voices: Sequence[str] | None, source: str) -> list[Row]:
    there = [name for name in file.schema_arrow.names if name not in PLAIN_COLUMNS]
    voices = there if voices is None else voices
    if missing := [voice for voice in voices if voice not in there]:
        raise ConfigError(
            source, [(voice, f"no such voice; there is {', '.join(there)}") for voice in missing]
        )
    columns = file.read_row_group(index, columns=[*PLAIN_COLUMNS, *voices]).to_pydict()
    plain = zip(*(columns[name] for name in PLAIN_COLUMNS), strict=True)
    place = f"{source}, row group {index}"
    return [
        Row(key, group, start, frames, {voice: columns[voice][i] for voice in voices}, place)
        for i, (key, group, start, frames) in enumerate(plain)
    ]


# --- the folder -----------------------------------------------------------------------------------


def manifest_url(url: str) -> str:
    return storage.join(url, "manifest.json")


def plan_url(url: str, name: str = "plan.json") -> str:
    """Where a run keeps what it needs to go on after an interruption."""
    return storage.join(url, ".plan", name)


def read_manifest(url: str) -> Manifest:
    """ConfigError where there is none yet, with the command that makes it."""
    try:
        data = storage.read_bytes(manifest_url(url))
    except (FileNotFoundError, NotADirectoryError):
        if storage.exists(plan_url(url)):
            source = json.loads(storage.read_bytes(plan_url(url)))["source"]
            again = f"{COMMAND} {source} {url} ..."
            text = f"these shards are unfinished; run the same command again to go on: {again}"
        else:
            text = f"no shards here (no manifest.json); make them with: {COMMAND} SOURCE {url}"
        raise ConfigError(url, [("", text)]) from None
    try:
        version = json.loads(data)["version"]
        if version == VERSION:
            return Manifest.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        text = f"not a manifest of {COMMAND}: {error!r}"
        raise ConfigError(manifest_url(url), [("", text)]) from None
    text = f"format version {version}, this bgray reads {VERSION}; write the shards again"
    raise ConfigError(manifest_url(url), [("", text)])


def verify(url: str, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read and decode everything; one line per corrupt shard, none when all is well."""
    manifest = read_manifest(url)
    problems = []
    for done, shard in enumerate(manifest.shards):
        problem = next(_shard_problems(url, shard, manifest), None)
        problems += [f"{shard.name}: {problem}"] if problem else []
        if progress:
            progress(done + 1, len(manifest.shards))
    return problems


def _shard_problems(url: str, shard: Shard, manifest: Manifest) -> Iterator[str]:
    try:
        data = storage.read_bytes(storage.join(url, shard.name))
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            yield f"corrupt: sha256 is {found[:12]}, the manifest says {shard.sha256[:12]}"
        file = pq.ParquetFile(io.BytesIO(data))
        shape = file.metadata.num_rows, file.num_row_groups
        if shape != (shard.rows, shard.row_groups):
            yield f"{shape} rows and row groups, the manifest says {(shard.rows, shard.row_groups)}"
        for index in range(file.num_row_groups):
            for row in _rows(file, index, list(manifest.voices), shard.name):
                for voice, stored in row.voices.items():
                    if (shape := _decode(stored).shape) != (manifest.channels, row.frames):
                        expected = manifest.channels, row.frames
                        yield f"{row.key} at {row.start}, {voice}: {shape}, not {expected}"
    except FileNotFoundError:
        yield "missing"
    except (OSError, ConfigError, *BROKEN, Corrupt) as error:
        yield f"unreadable: {error}"


def main() -> None:
    """The command line."""
    # rich and argparse are no business of the workers that import the readers.
    from bgray import shards_command

    shards_command.main()


if __name__ == "__main__":
    # So that Ray pickles bgray.shards.*, not __main__.*, by reference.
    from bgray.shards import main

    main()
