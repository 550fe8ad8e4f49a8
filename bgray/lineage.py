"""Names what a training batch was cut from: shard, row group, chunk, crop, the seeds of its draws.

For a person who looks for what made a loss explode: with it the batch can be made again, also
after the code that made it has changed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bgray import data, shards
from bgray.data import Chunk, Recipe


def identify(recipe: Recipe, step: int, world: int = 1) -> list[dict[str, Any]]:
    """Each row, in order, of the batch that step `step` (counted from 0) trains on.

    `rng` seeds numpy's generator, from which first the task draws and then the augmentation.
    `crops`: all that the task asks for, in that order; one that draws until enough plays
    (separation's min_activity) asks for more than it keeps. Reads the shards, as the batch does.
    """
    unit, share = recipe.unit_of(step), recipe.batch_size // world
    crops: list[dict[str, Any]] = []
    places = _places(recipe, unit)
    chunks: list[Chunk] = [
        _Told(chunk, places, crops.append) for chunk in data.read_groups(recipe, unit)
    ]
    rows = []
    for row in range(recipe.batch_size):
        k = step % recipe.batches_per_unit * recipe.batch_size + row
        crops.clear()
        data.example(recipe, chunks, unit, k)
        rng = [recipe.seed, data.ROW, unit, k]
        rows.append({"row": row, "rank": row // share, "rng": rng, "crops": list(crops)})
    return rows


Places = dict[tuple[str, str, int], dict[str, Any]]


def _places(recipe: Recipe, unit: int) -> Places:
    """Where each chunk of a unit lies, by what a row knows of itself."""
    found = {}
    for shard, group in data.groups_of(recipe, unit):
        for i, row in enumerate(shards.read_row_group(recipe.url, shard, group, voices=())):
            place = {"shard": shard, "row_group": group, "row_in_group": i}
            found[row.place, row.key, row.start] = place
    return found


class _Told(Chunk):
    """A chunk that tells what is cut from it."""

    def __init__(self, chunk: Chunk, places: Places, tell: Callable[[dict[str, Any]], None]):
        super().__init__(chunk.row, chunk.sample_rate, chunk.key, chunk.uses)
        row = chunk.row
        self._place = places[row.place, row.key, row.start]
        self._tell = tell

    def crop(self, voice: str, start: int, length: int) -> np.ndarray:
        chunk = {"chunk": f"{self.row.key} @{self.row.start}", "chunk_seed": list(self.key)}
        self._tell({**self._place, **chunk, "voice": voice, "start": start, "frames": length})
        return super().crop(voice, start, length)
