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
from bgray.shards import Options
from bgray.sources import Item, Rejected

MB = 1_000_000
LARGEST_SHARD, SMALLEST_SHARD, FEWEST_SHARDS = 96 * MB, 8 * MB, 16
FLAC_BYTES_PER_SAMPLE = 1.0  # of 2; 0.7 (stems) to 1.1 (speech) were measured
# Of CDs; the compressed ones come to about 20 kB/s.
BYTES_PER_SECOND = {".wav": 176_400, ".aiff": 176_400, ".aif": 176_400, ".flac": 100_000}
SPLITS = ("train", "validation")
NOT_IN_ROWS = ("group", "validation", "validation_groups", "max_rejected", "songs")


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
        return ("audio", *self.stems, *(f"shift_{by:g}" for by in self.options.shifts))

    @property
    def hash(self) -> str:
        """Of everything that decides the shard's bytes, and of its files' size and time."""
        options = dataclasses.asdict(self.options)
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
    rejected, sizes, usable = dict(unusable), {}, []
    for item in items:
        try:
            sizes[item.key] = _estimate(item, options)
            usable.append(item)
        except Rejected as reason:
            rejected[item.key] = str(reason)
    usable, duplicates = _without_duplicates(usable)
    if not usable:
        return Plan([], rejected, duplicates)
    chosen = validation_groups(sorted({item.group for item in usable}), options)
    stems = (
        tuple(sorted({part.stem for item in usable for part in item.parts}))
        if options.stems
        else ()
    )
    if options.stems and usable[0].song >= 0:
        from bgray.band import PROGRAMS

        stems = tuple(PROGRAMS.values())
    voices = 1 + len(stems) + len(options.shifts)
    total = voices * sum(sizes[item.key] for item in usable)
    # Stems are large; below one full row group a shard could not mix its songs.
    row_group = voices * shards.ROW_GROUP_SIZE * _bytes(shards.CHUNK_SECONDS, options)
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
    elif storage.is_remote(item.parts[0].path):  # a header costs a request there
        suffixes = [os.path.splitext(part.name)[1].lower() for part in item.parts]
        seconds = max(
            p.size / BYTES_PER_SECOND.get(s, 20_000)
            for p, s in zip(item.parts, suffixes, strict=True)
        )
    else:
        headers = sources.read_header(item, options)
        seconds = max(header.frames / header.sample_rate for header in headers)
    return _bytes(seconds, options)


def _bytes(seconds: float, options: Options) -> float:
    return seconds * options.sample_rate * options.channels * FLAC_BYTES_PER_SAMPLE


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


def listing(items: Iterable[Item]) -> list[Any]:
    """What the items are, without where they lie, as plain data."""
    return [[i.key, i.group, i.song, [[p.name, p.size, p.stamp] for p in i.parts]] for i in items]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
