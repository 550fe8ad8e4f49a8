"""Sources to shards: runs the plan's jobs on Ray Data or in this process, then writes the manifest.

A job is one shard and a pure function of its part of the plan, so that an interrupted run goes on
where it stopped and ends in the same bytes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bgray import layouts, shards, sources, storage
from bgray.config import ConfigError, digest
from bgray.encoding import to_int16
from bgray.layouts import Item
from bgray.plan import LATER, SPLITS, Job, choice, chunk_seconds, listing, make_plan, sha, way_out
from bgray.resources import data_placement, of_cluster
from bgray.shards import CHUNK_SECONDS, Manifest, Options, Row, Shard
from bgray.sources import PIECE, Rejected

SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet")
WRITTEN_NAMES = rf"({SHARD_NAME.pattern}|manifest\.json)"


def prepare(
    source: str,
    destination: str,
    options: Options,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """See `bgray.shards.prepare`."""
    # Workers of a cluster start in another folder.
    if source != "builtin":
        source = _absolute(source)
    destination = _absolute(destination)
    items, unusable, ignored = layouts.list_items(source, options)
    plan_hash = digest([shards.VERSION, choice(options), listing(items), unusable])[:24]
    with _writing(destination):
        if storage.exists(shards.manifest_url(destination)):
            manifest = shards.read_manifest(destination)
            keys = {item.key for item in items} | unusable.keys()
            _check_same(destination, manifest, plan_hash, options, keys)
            return manifest
    total = len(items) + len(unusable)
    asked, options = options, _with_soundfont(items, options)
    plan = make_plan(items, unusable, destination, options)
    _check_rejected(source, plan.rejected, total - len(plan.duplicates), options)
    with _writing(destination):
        _begin(destination, source, plan_hash, {job.hash for job in plan.jobs})
        leftovers = storage.leftovers(destination, WRITTEN_NAMES)
    reports = {job.hash: report for job in plan.jobs if (report := finished(job))}
    waiting = [job for job in plan.jobs if job.hash not in reports]
    if progress:
        progress(len(reports), len(plan.jobs))
    for report in _run(waiting, workers):
        if "problem" in report:
            raise ConfigError(destination, [("", report["problem"])])
        reports[report["job"]] = report
        if progress:
            progress(len(reports), len(plan.jobs))
    done = [reports[job.hash] for job in plan.jobs]
    rejected = plan.rejected | {
        path: reason for report in done for path, reason in report["rejected"].items()
    }
    _check_rejected(source, rejected, total - len(plan.duplicates), options)
    manifest = Manifest(
        sample_rate=options.sample_rate,
        channels=options.channels,
        voices=dict.fromkeys(plan.jobs[0].voices, shards.ENCODINGS[options.kind]),
        variants=options.variants,
        files=sorted(
            (file for report in done for file in report["files"]), key=lambda file: file["key"]
        ),
        rejected=[{"path": path, "reason": reason} for path, reason in sorted(rejected.items())],
        duplicates=plan.duplicates,
        ignored=ignored,
        shards=tuple(Shard(**report["shard"]) for report in done if report["shard"]),
        options={
            "source": source,
            **dataclasses.asdict(asked),
            **({"played_with": options.soundfont} if options.soundfont else {}),
        },
        plan=plan_hash,
        chunk_seconds=chunk_seconds(options),
    )
    for split in SPLITS:
        if not manifest.rows(split):
            text = f"zero {split} files: all that were chosen are rejected; {way_out(options)}"
            raise ConfigError(source, [("", text), *list(rejected.items())[:10]])
    with _writing(destination):
        for name in set(storage.listdir(destination)) - {shard.name for shard in manifest.shards}:
            # Left by an earlier, unfinished plan.
            if SHARD_NAME.fullmatch(name):
                storage.remove(storage.join(destination, name))
        # Unchanged all the while: of a process that was killed, not of one that is writing now.
        now = storage.leftovers(destination, WRITTEN_NAMES)
        for path in (path for path, time in leftovers.items() if now.get(path) == time):
            storage.remove(path)
        storage.write_bytes(shards.manifest_url(destination), manifest.to_json())
    return shards.read_manifest(destination)


def _with_soundfont(items: list[Item], options: Options) -> Options:
    """Where MIDI is to be played: the options with what it is played with, or ConfigError."""
    if not options.stems or not any(map(sources.is_midi, items)):
        if options.soundfont:
            raise ConfigError("soundfont", [("", "nothing to play: it is for MIDI with --stems")])
        return options
    from bgray import rendering

    return dataclasses.replace(
        options, soundfont=rendering.check(options.soundfont, options.sample_rate)
    )


# --- the jobs -------------------------------------------------------------------------------------


def _run(jobs: list[Job], workers: int | None) -> Iterator[dict[str, Any]]:
    """Their reports, as they finish."""
    if workers == 0 or len(jobs) <= 1:  # Ray takes longer to start than one shard to write
        yield from map(write_shard, jobs)
        return
    from bgray.session import ray_session

    with ray_session() as ray:
        rows = [{"job": pickle.dumps(job)} for job in jobs]
        dataset = ray.data.from_items(rows, override_num_blocks=len(jobs))
        place = data_placement("auto", of_cluster(ray)) or None
        written = dataset.map(_write_row, num_cpus=1, resources=place, concurrency=workers)
        for row in written.iter_rows():
            yield json.loads(row["report"])


def _write_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"report": json.dumps(write_shard(pickle.loads(row["job"])))}


def finished(job: Job) -> dict[str, Any] | None:
    """The report of a job that an earlier run finished, if its shard is still there whole."""
    try:
        report = json.loads(
            storage.read_bytes(shards.plan_url(job.destination, f"{job.hash}.json"))
        )
        if report["shard"]:
            if storage.size(storage.join(job.destination, job.name)) != report["shard"]["bytes"]:
                return None
        return report
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_shard(job: Job) -> dict[str, Any]:
    """Read the job's items, write its shard, then its report, which says that it is done.

    A full disk is in the report too (`problem`): raised, it would leave Ray as a page of traceback.
    """
    try:
        return _write_shard(job)
    except ConfigError as error:
        return {"job": job.hash, "problem": error.problems[0][1]}


def _write_shard(job: Job) -> dict[str, Any]:
    rows, places, files, rejected = [], [], [], {}
    for item in job.items:
        try:
            clip = sources.read_clip(item, job.options, job.stems)
        except Rejected as reason:
            rejected[item.key] = str(reason)
            continue
        chunks = _chunks(item, clip, job)
        rows += chunks
        places += _places(item.key, len(chunks))
        file: dict[str, Any] = {"key": item.key, "split": job.split, "group": item.group}
        file["seconds"] = sum(row.frames for row in chunks) / job.options.sample_rate
        file |= {
            "source_rate": clip.source_rate,
            "source_channels": clip.source_channels,
            "sha256": clip.sha256,
            "gain_db": round(clip.gain_db, 3) + 0.0,
        }
        if job.stems:
            file["muted"] = list(clip.muted)
        if item.left_out:
            file["left_out"] = list(item.left_out)
        if job.options.kind == "roll":
            used = sum(row.frames for row in chunks)
            file["ones"] = int(clip.voices["roll"][:, :used].sum())
        files.append(file)
    shard = None
    with _writing(job.destination):
        if rows:
            mixed = [rows[i] for i in np.argsort(places)]
            data = shards.encode_shard(mixed, job.voices)
            storage.write_bytes(storage.join(job.destination, job.name), data)
            groups = math.ceil(len(rows) / shards.ROW_GROUP_SIZE)
            content = hashlib.sha256(data).hexdigest()
            shard = dataclasses.asdict(
                Shard(job.name, job.split, len(rows), groups, len(data), content)
            )
        report = {"job": job.hash, "shard": shard, "files": files, "rejected": rejected}
        storage.write_bytes(
            shards.plan_url(job.destination, f"{job.hash}.json"), json.dumps(report).encode()
        )
    return report


def _places(key: str, count: int) -> list[float]:
    """Where in its shard (0 to 1) each chunk of a file goes: spread evenly, in random order.

    A row group is what training reads at once; so every one holds its share of every long file. A
    plain shuffle of 16 chunks from 4 files left 2 of them out of the first row group.
    """
    rng = np.random.default_rng(int(sha(key)[:16], 16))
    return list((rng.permutation(count) + rng.random(count)) / count)


def _chunks(item: Item, clip: sources.Clip, job: Job) -> list[Row]:
    length, rate, kind = (
        next(iter(clip.voices.values())).shape[1],
        job.options.sample_rate,
        job.options.kind,
    )
    whole = {name: clip.voices[name] for name in job.voices}  # each (C, T)
    if kind == "audio":
        whole, bounds = {name: to_int16(v) for name, v in whole.items()}, chunk_bounds(length, rate)
    else:
        bounds = piece_bounds(length)
    rows = []
    for start, end in bounds:
        stored = {n: shards.encode_voice(v[:, start:end], rate, kind) for n, v in whole.items()}
        rows.append(Row(item.key, item.group, start, end - start, stored))
    return rows


def chunk_bounds(length: int, sample_rate: int) -> list[tuple[int, int]]:
    """(start, end) of each chunk, in samples; a tail below half a chunk goes to the one before."""
    chunk = round(CHUNK_SECONDS * sample_rate)
    count = max(1, (length + chunk // 2) // chunk)
    return [(i * chunk, (i + 1) * chunk if i < count - 1 else length) for i in range(count)]


def piece_bounds(length: int) -> list[tuple[int, int]]:
    """(start, end) of each whole piece of a roll, in steps; the rest of it is left out."""
    return [(i * PIECE, (i + 1) * PIECE) for i in range(length // PIECE)]


# --- the destination ------------------------------------------------------------------------------


def _absolute(url: str) -> str:
    return url if storage.is_remote(url) else str(Path(url).absolute())


def _begin(destination: str, source: str, plan_hash: str, jobs: set[str]) -> None:
    """Record the plan; of another one keep the reports of the jobs that both have, and forget the
    rest, whose shards may be overwritten."""
    url = shards.plan_url(destination)
    if storage.exists(url):
        if json.loads(storage.read_bytes(url))["plan"] == plan_hash:
            return
        for name in storage.listdir(storage.join(destination, ".plan")):
            if name.removesuffix(".json") not in {*jobs, "plan"}:
                storage.remove(shards.plan_url(destination, name))
    else:
        there = [name for name in storage.listdir(destination) if SHARD_NAME.fullmatch(name)]
        if there:
            text = f"holds {there[0]}, which bgray did not write here; give another folder"
            raise ConfigError(destination, [("", text)])
    storage.write_bytes(url, json.dumps({"plan": plan_hash, "source": source}).encode())


def _check_same(
    destination: str, manifest: Manifest, plan_hash: str, options: Options, keys: set[str]
) -> None:
    if manifest.plan == plan_hash:
        return
    now, before = (json.loads(json.dumps(o)) for o in (dataclasses.asdict(options), LATER))
    differences = [
        (name, f"there {manifest.options.get(name, before.get(name))!r}, now {value!r}")
        for name, value in now.items()
        if manifest.options.get(name, before.get(name)) != value and name != "max_rejected"
    ]
    if not differences:
        entries = [file["key"] for file in manifest.files]
        then = {*entries, *(entry["path"] for entry in (*manifest.rejected, *manifest.duplicates))}
        for title, names in (("new since then", keys - then), ("gone since then", then - keys)):
            if names:
                differences.append(("source", f"{len(names)} files {title}, such as {min(names)}"))
        differences = differences or [("source", "files changed since then (size or time)")]
    text = "holds shards of other sources or options; give another destination, or delete this one"
    raise ConfigError(destination, [("", text), *differences])


def _check_rejected(source: str, rejected: dict[str, str], total: int, options: Options) -> None:
    share = len(rejected) / max(total, 1)
    if share <= options.max_rejected and len(rejected) < total:
        return
    problems = sorted(rejected.items())[:10]
    if len(rejected) > 10:
        problems.append(("", f"... and {len(rejected) - 10} more"))
    way_out = f"above --max-rejected {options.max_rejected:g}; remove or repair them, or allow more"
    way_out = way_out if len(rejected) < total else "nothing is left"
    raise ConfigError(
        source, [*problems, ("", f"{len(rejected)} of {total} rejected ({share:.0%}), {way_out}")]
    )


@contextlib.contextmanager
def _writing(destination: str) -> Iterator[None]:
    """A disk or bucket that cannot be written, as one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"cannot write shards: {error}; make it writable"
        if full:
            what = f"no space left on {destination} while writing shards; free some"
        text = f"{what} and run the same command again: finished shards are kept"
        raise ConfigError(destination, [("", text)]) from error
