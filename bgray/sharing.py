"""Whether a sweep's trials see the same data, and where what one makes is then kept for the
others."""

import collections
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bgray import storage
from bgray.config import Experiment, FeedCache, digest
from bgray.feed_room import GIB, used_bytes
from bgray.resources import Plan

if TYPE_CHECKING:
    from bgray.agenda import Agenda

MOST_GIB, OF_FREE, LEAST_GIB = 50.0, 0.25, 0.25
"""Of an automatic cache: its bound, its share of the free disk, and what is not worth the while."""
DECIDES = ("data.", "task.", "train.batch_size")
"""Paths that change the stream of examples."""


def stream_of(experiment: Experiment, data_hash: str) -> str:
    """Equal for trials that see the same examples at the same steps."""
    data, train = experiment.data, experiment.train
    return digest(
        [
            data_hash,
            experiment.resolved()["task"],
            [[pick.name, pick.options] for pick in data.augment],
            [data.segment, data.row_groups_per_unit, data.batches_per_unit],
            [train.batch_size, train.seed, experiment.runtime.workers],
        ]
    )


def settle(plan: Plan, agenda: "Agenda") -> Plan:
    """The plan with what `runtime.feed_cache: auto` means for this sweep, and why."""
    trials = list(agenda.trials.values())
    runtime = trials[0].experiment.runtime
    if runtime.feed_cache != "auto":
        return plan
    streams = collections.Counter(stream_of(t.experiment, t.data_hash) for t in trials)
    shared = sum(count for count in streams.values() if count > 1)
    cache, text = None, "no feed cache: no two trials see the same data"
    searched = [path for path in agenda.sweep.search if path.startswith(DECIDES)]
    if agenda.draws and agenda.draws.left and not searched:
        shared = max(shared, agenda.draws.left + 1)  # those to come draw nothing that changes it
    if shared:
        cache, text = automatic(runtime.cache, shared)
    feed = dataclasses.replace(plan.feed, cache=cache, reason=f"{plan.feed.reason}; {text}")
    return dataclasses.replace(plan, feed=feed)


def automatic(folder: str, shared: int) -> tuple[FeedCache | None, str]:
    """A cache below this folder for so many trials, and why; None where it is not to be."""
    if storage.is_remote(folder):
        return None, f"no feed cache: {folder} is no local folder"
    root = Path(folder).absolute() / "feed"
    there = next(path for path in (root, *root.parents) if path.exists())
    disk = os.statvfs(there)
    free = disk.f_frsize * disk.f_bavail + used_bytes(root)
    gib = round(min(MOST_GIB, OF_FREE * free / GIB), 2)
    if gib < LEAST_GIB:
        return None, f"no feed cache: {free / GIB:.2f} GiB free at {there}"
    text = f"units are kept in {root}, {gib:g} GiB at most: {shared} trials see the same data"
    return FeedCache(str(root), gib), text
