"""Coordinate shards: channel 0 of a chunk is its number, channel 1 the sample's position, so that
every crop says where it came from. The shifted voice is the negated audio."""

from typing import NamedTuple

import numpy as np

from bgray import shards, storage
from bgray.config import digest
from bgray.data import training_recipe
from bgray.tasks import Unshift

RATE, FRAMES = 8000, 900


def coordinates(number, frames=FRAMES):
    return np.stack([np.full(frames, number + 1), np.arange(1, frames + 1)]).astype(np.int16)


def write_folder(url, layout, voices_of=None):
    """layout: {shard name: number of chunks}; chunks are numbered through all shards."""
    number, listed = 0, []
    for name, count in layout.items():
        rows = []
        for _ in range(count):
            audio = coordinates(number)
            voices = voices_of(number) if voices_of else {"audio": audio, "shift_12": -audio}
            flac = {voice: shards.encode_flac(a, RATE) for voice, a in voices.items()}
            frames = voices["audio"].shape[1]
            rows.append(shards.Row(f"file{number:03d}.wav", "group", 0, frames, flac))
            number += 1
        content = shards.encode_shard(rows, ["audio", "shift_12"])
        storage.write_bytes(storage.join(url, name), content)
        groups = -(-count // shards.ROW_GROUP_SIZE)
        split = name.split("-")[0]
        listed.append(shards.Shard(name, split, count, groups, len(content), digest(name)))
    return shards.Manifest(
        sample_rate=RATE,
        channels=2,
        voices={"audio": "flac", "shift_12": "flac"},
        variants={},
        files=[],
        rejected=[],
        duplicates=[],
        ignored=0,
        shards=tuple(listed),
        options={},
        plan="",
    )


class Folder(NamedTuple):
    url: str
    manifest: shards.Manifest


def training_folder(path):
    """Seven training row groups, of 8, 8, 3, 8, 8, 8 and 1 chunks, and nine validation chunks."""
    layout = {"train-00000.parquet": 19, "train-00001.parquet": 25, "validation-00000.parquet": 9}
    return Folder(str(path), write_folder(str(path), layout))


def recipe_of(folder, **changes):
    options = {
        "task": Unshift(),
        "augment": (),
        "segment": 64,
        "batch_size": 8,
        "seed": 3,
        "groups_per_unit": 2,
        "batches_per_unit": 3,
    } | changes
    return training_recipe(folder.manifest, folder.url, **options)


def same(found, expected):
    found, expected = list(found), list(expected)
    assert [batch.step for batch in found] == [batch.step for batch in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.targets, b.targets)
