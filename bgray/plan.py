"""Which source goes into which shard, and which split: from the listing and the options alone.

Never from the number of CPUs or the time of day: the same command makes the same shards everywhere.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bgray import shards, sources, storage
from bgray.config import ConfigError, digest
from bgray.layouts import Item, suffix
from bgray.shards import Options
from bgray.sources import Rejected

MB = 1_000_000
LARGEST_SHARD, SMALLEST_SHARD, FEWEST_SHARDS = 96 * MB, 8 * MB, 16
# Of 2; 0.7 (stems) to 1.1 (speech) were measured. Rolls take a hundredth of it, but parsing MIDI
# takes so long that it should be spread over as many workers.
BYTES_PER_SAMPLE = 1.0
MIDI_BYTES_PER_BEAT = 40
# Of CDs; the compressed ones come to about 20 kB/s.
BYTES_PER_SECOND = {".wav": 176_400, ".aiff": 176_400, ".aif": 176_400, ".flac": 100_000}
OTHER_BYTES_PER_SECOND = 20_000
SPLITS = ("train", "validation")
NOT_IN_ROWS = ("group", "validation", "validation_groups", "songs")
# Left out of hashes where they say nothing, so that plans made before there were such options hold.
LATER = {"kind": "audio", "round_trips": (), "soundfont": ""}


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    name: str
    split: str
    destination: str
    options: Options
    stems: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def voices(self) -> tuple[str, ...]:
        if self.options.kind == "roll":
            return ("roll",)
        return ("audio", *self.stems, *self.options.variants)

    @property
    def hash(self) -> str:
        """Of everything that decides the shard's bytes, and of its files' size and time."""
        options = choice(self.options)
        content = {key: options[key] for key in options if key not in NOT_IN_ROWS}
        return digest([shards.VERSION, self.name, content, self.stems, listing(self.items)])[:24]


@dataclass(frozen=True)
class Plan:
    jobs: list[Job]
    rejected: dict[str, str]
    """Ruled out before decoding anything: path to reason."""
    duplicates: list[dict[str, str]]


def make_plan(
    items: list[Item], unusable: dict[str, str], destination: str, options: Options
) -> Plan:
    """Which items go to which shard.

    Reads the headers of local files, and hashes files of equal size to find duplicates.
    """
    rejected, sizes, names, usable = dict(unusable), {}, {}, []
    for item in items:
        try:
            sizes[item.key] = _estimate(item, options)
            names[item.key] = sources.stem_names(item) if options.stems else ()
            usable.append(item)
        except Rejected as reason:
            rejected[item.key] = str(reason)
    usable, duplicates = _without_duplicates(usable)
    if not usable:
        return Plan([], rejected, duplicates)
    chosen = validation_groups(sorted({item.group for item in usable}), options)
    found = dict.fromkeys(name for item in usable for name in names[item.key])
    stems = tuple(found) if usable[0].song >= 0 else tuple(sorted(found))  # the band has its order
    voices = 1 + len(stems) + len(options.variants)
    total = voices * sum(sizes[item.key] for item in usable)
    # Stems are large; below one full row group a shard could not mix its songs.
    row_group = voices * shards.ROW_GROUP_SIZE * _bytes(chunk_seconds(options), options)
    target = min(LARGEST_SHARD, max(SMALLEST_SHARD, row_group, total / FEWEST_SHARDS))
    jobs = []
    for split in SPLITS:
        # In the order of their hashes, so that a shard holds files from all over the source.
        there = sorted(
            (i for i in usable if (i.group in chosen) == (split == "validation")),
            key=lambda i: sha(i.key),
        )
        bins: list[list[Item]] = []
        room = 0.0
        for item in there:
            size = sizes[item.key] * voices
            if size > room:
                bins.append([])
                room = target
            bins[-1].append(item)
            room -= size
        for number, chosen_items in enumerate(bins):
            name = f"{split}-{number:05}.parquet"
            jobs.append(Job(name, split, destination, options, stems, tuple(chosen_items)))
    return Plan(jobs, rejected, duplicates)


def validation_groups(groups: list[str], options: Options) -> set[str]:
    """The groups kept for validation: those named, or the first in the order of their hashes.

    By hash, so that a file more or less moves few others to the other split.
    """
    if options.validation_groups:
        unknown = [name for name in options.validation_groups if name not in groups]
        if unknown:
            raise ConfigError(
                "validation groups", [(name, _unknown_group(name, groups)) for name in unknown]
            )
        if len(set(options.validation_groups)) == len(groups):
            raise ConfigError(
                "validation groups", [("", "they are all there is: zero train files; name fewer")]
            )
        return set(options.validation_groups)
    count = min(math.ceil(round(options.validation * len(groups), 6)), len(groups) - 1)
    if count < 1:
        why = f"--validation 0; {way_out(options)}"
        if len(groups) == 1:  # no share of it helps
            why = f"only one group ({groups[0]}); add files{_regroup(options)}"
        raise ConfigError("split", [("", f"zero validation files: {why}")])
    return set(sorted(groups, key=sha)[:count])


def way_out(options: Options) -> str:
    return f"give --validation or --validation-groups, or add files{_regroup(options)}"


def _regroup(options: Options) -> str:
    return " or use --group file" if options.group == "folder" else ""


def _unknown_group(name: str, groups: list[str]) -> str:
    near = difflib.get_close_matches(name, groups, 1)
    if near:
        return f"unknown group, did you mean '{near[0]}'?"
    return f"unknown group; there is {', '.join(groups[:5])}{' ...' if len(groups) > 5 else ''}"


def _estimate(item: Item, options: Options) -> float:
    """Bytes that one voice will take, roughly."""
    if item.song >= 0:
        seconds = options.seconds
    elif not all(part.size for part in item.parts):
        raise Rejected("empty (0 bytes)")
    elif options.kind == "roll" and not storage.is_remote(item.parts[0].path):
        # Read whole: a MIDI file has no header that tells, and many are ruled out, which must not
        # leave a split without files.
        seconds = sources.read_clip(item, options, ()).voices["roll"].shape[1] / shards.ROLL_RATE
    elif sources.is_midi(item):  # as if all were at 60 beats a minute
        seconds = item.parts[0].size / MIDI_BYTES_PER_BEAT
    elif storage.is_remote(item.parts[0].path):  # a header costs a request there
        rates = [
            BYTES_PER_SECOND.get(suffix(part.name), OTHER_BYTES_PER_SECOND) for part in item.parts
        ]
        seconds = max(part.size / rate for part, rate in zip(item.parts, rates, strict=True))
    else:
        headers = sources.read_header(item, options)
        seconds = max(header.frames / header.sample_rate for header in headers)
    return _bytes(seconds, options)


def chunk_seconds(options: Options) -> float:
    """Of most rows of audio, and of every row of rolls, where they are beats."""
    return shards.ROLL_BEATS if options.kind == "roll" else shards.CHUNK_SECONDS


def _bytes(seconds: float, options: Options) -> float:
    return seconds * options.sample_rate * options.channels * BYTES_PER_SAMPLE


def _without_duplicates(items: list[Item]) -> tuple[list[Item], list[dict[str, str]]]:
    """Only files of one size are hashed: most sources have none."""
    by_size: dict[Any, list[Item]] = {}
    for item in items:
        by_size.setdefault(tuple(part.size for part in item.parts) or item.song, []).append(item)
    same: dict[str, str] = {}
    for bucket in (bucket for bucket in by_size.values() if len(bucket) > 1):
        first: dict[Any, str] = {}
        for item in bucket:
            with contextlib.suppress(Rejected):  # named by the job that reads it
                content = tuple(
                    hashlib.sha256(sources.read_bytes(part)).hexdigest() for part in item.parts
                )
                if (original := first.setdefault(content, item.key)) != item.key:
                    same[item.key] = original
    duplicates = [
        {"path": path, "reason": f"same content as {same[path]}"} for path in sorted(same)
    ]
    return [item for item in items if item.key not in same], duplicates


def choice(options: Options) -> dict[str, Any]:
    """The options that decide what is in the shards, as plain data, for hashes."""
    values = dataclasses.asdict(options)
    del values["max_rejected"]
    if options.soundfont:  # wherever it lies
        size = os.path.getsize(options.soundfont) if os.path.exists(options.soundfont) else 0
        values["soundfont"] = [os.path.basename(options.soundfont), size]
    return {key: value for key, value in values.items() if LATER.get(key, ...) != value}


def listing(items: Iterable[Item]) -> list[Any]:
    """What the items are, without where they lie, as plain data."""
    return [[i.key, i.group, i.song, [[p.name, p.size, p.stamp] for p in i.parts]] for i in items]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
