"""Work units: a batch is a pure function of (recipe, step); whoever makes it runs the same
function.

A unit is a few row groups of the shards, taken in a seeded permutation. Each of its chunks is
decoded once and many crops are cut from it, spread over several batches. Row k of unit u is drawn
with a generator keyed by (seed, u, k), never by worker, process or time: so a run resumes at any
step, every trial of a sweep sees the same data, and the number of workers changes nothing.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bgray import shards
from bgray.config import ConfigError

# Keys of generators that must never meet: (seed, purpose, index ...).
PERMUTATION, CHUNK_ORDER, ROW, CHUNK = 0, 1, 2, 3


class Batch(NamedTuple):
    """One training step's examples; int16, because that is what travels and what the files hold."""

    step: int
    """Counted from 0."""
    inputs: np.ndarray
    """(B, C, T) int16, full scale is 32768; may be read-only."""
    targets: np.ndarray
    """(B, S, C, T) int16."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the training stream; small, picklable, the same on every
    machine."""

    url: str
    groups: tuple[tuple[str, int], ...]
    """(shard name, row group) of the training split, in manifest order."""
    task: Any
    augment: tuple[Any, ...]
    sample_rate: int
    segment: int
    batch_size: int
    """Over all ranks."""
    seed: int
    groups_per_unit: int
    batches_per_unit: int
    data_hash: str = ""
    """The manifest's: what lies at `url`."""

    def unit_of(self, step: int) -> int:
        return step // self.batches_per_unit


class Chunk:
    """One shard row whose voices are decoded when first asked for.

    key: of generators that all examples cut from this chunk in this unit share; empty outside a
    unit.
    uses: how many examples the unit cuts from it, over all ranks.
    """

    def __init__(
        self, row: "shards.Row", sample_rate: int, key: tuple[int, ...] = (), uses: int = 1
    ):
        self.row, self.sample_rate, self.key, self.uses = row, sample_rate, key, uses
        self._decoded: dict[str, np.ndarray] = {}
        self._made: dict[Hashable, Any] = {}

    @classmethod
    def whole(cls, voices: dict[str, np.ndarray], sample_rate: int) -> "Chunk":
        """A track held in memory, (C, T) int16 each, to be read as a chunk is."""
        frames = next(iter(voices.values())).shape[1]
        chunk = cls(shards.Row("", "", 0, frames, {}), sample_rate)
        chunk._decoded = dict(voices)
        return chunk

    def cached(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when `name` was first asked for: work that several examples
        share."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def frames(self) -> int:
        return self.row.frames

    def crop_start(self, length: int, rng: np.random.Generator | None) -> int:
        """First sample of a crop: random, or the centre without `rng`; 0 where the chunk is
        shorter."""
        slack = max(0, self.frames - length)
        return slack // 2 if rng is None else int(rng.integers(0, slack + 1))

    def crop(self, voice: str, start: int, length: int) -> np.ndarray:
        """(C, length) int16 from `start`; zeros before the chunk's beginning and after its end."""
        if voice not in self._decoded:
            self._decoded[voice] = shards.decode_voice(self.row, voice)
        audio = self._decoded[voice]
        low, high = max(0, start), min(audio.shape[1], start + length)
        if (low, high) == (start, start + length):
            return audio[:, low:high]
        out = np.zeros((audio.shape[0], length), np.int16)
        if high > low:
            out[:, low - start : high - start] = audio[:, low:high]
        return out


def groups_of(recipe: Recipe, unit: int) -> list[tuple[str, int]]:
    """(shard name, row group) of a unit, in the order in which they are read."""
    count, places = len(recipe.groups), []
    for position in range(unit * recipe.groups_per_unit, (unit + 1) * recipe.groups_per_unit):
        permutation = _permutation(recipe.seed, position // count, count)
        places.append(recipe.groups[permutation[position % count]])
    return places


def read_groups(recipe: Recipe, unit: int) -> list[Chunk]:
    """The chunks of a unit in their drawn order: groups from a fresh permutation at each pass over
    the data."""
    chunks = []
    for shard, index in groups_of(recipe, unit):
        rows = shards.read_row_group(recipe.url, shard, index, voices=recipe.task.voices)
        chunks += [Chunk(row, recipe.sample_rate) for row in rows]
    order = np.random.default_rng([recipe.seed, CHUNK_ORDER, unit]).permutation(len(chunks))
    examples = recipe.batch_size * recipe.batches_per_unit
    for place, i in enumerate(order):
        chunks[i].key = (recipe.seed, CHUNK, unit, place)
        chunks[i].uses = max(1, examples // len(chunks))
    return [chunks[i] for i in order]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, PERMUTATION, epoch]).permutation(count)


def make_unit(
    recipe: Recipe, unit: int, rank: int = 0, world: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Rank's share of every batch of a unit: inputs (n, B/world, C, T) and targets (n, B/world, S,
    C, T), int16.

    Rows of a batch are spread evenly over the unit's chunks, in order, so that a rank decodes only
    its own chunks.
    """
    chunks = read_groups(recipe, unit)
    share = recipe.batch_size // world
    places = [(batch, row) for batch in range(recipe.batches_per_unit) for row in range(share)]
    inputs = targets = np.empty(0, np.int16)
    for number, (batch, row) in enumerate(places):
        k = batch * recipe.batch_size + rank * share + row
        x, y = example(recipe, chunks, unit, k)
        if number == 0:
            shape = (recipe.batches_per_unit, share)
            inputs = np.empty((*shape, *x.shape), np.int16)  # (n, B, C, T)
            targets = np.empty((*shape, *y.shape), np.int16)  # (n, B, S, C, T)
        elif (x.shape, y.shape) != (inputs.shape[2:], targets.shape[2:]):
            raise ValueError(f"example {k} of unit {unit} has shapes {x.shape} and {y.shape}")
        inputs[batch, row], targets[batch, row] = x, y
    return inputs, targets


def example(recipe: Recipe, chunks: list[Chunk], unit: int, k: int) -> tuple[Any, Any]:
    """Row k of a unit, counted through its batches: (C, T) and (S, C, T), int16."""
    if len(chunks) <= recipe.batch_size:
        index = k % recipe.batch_size * len(chunks) // recipe.batch_size
    else:
        index = k % len(chunks)
    rng = np.random.default_rng([recipe.seed, ROW, unit, k])
    x, y = recipe.task.example(chunks, index, rng, recipe.segment)
    return _augment(recipe, x, y, rng)


def _augment(recipe: Recipe, x: np.ndarray, y: np.ndarray, rng: np.random.Generator):
    """The same draw for the input and every source of the target: (C, T) and (S, C, T), int16 in
    and out."""
    if not recipe.augment:
        return x, y
    additive = recipe.task.additive
    voices = [source.astype(np.float32) / 32768 for source in y]
    voices = [sum(voices) if additive else x.astype(np.float32) / 32768, *voices]
    for transform in recipe.augment:
        draw = transform.draw(rng)
        voices = [transform.apply(voice, draw, recipe.sample_rate) for voice in voices]
    # One gain for all of them where any would clip, so that input and target still belong together.
    peak = max(float(np.abs(voice).max(initial=0)) for voice in voices)
    room = 32767 - (len(voices) if additive else 0)  # rounding adds up too
    scale = 32768 * min(1.0, room / 32768 / max(peak, 1e-9))
    x, *sources = (np.rint(voice * scale).astype(np.int16) for voice in voices)
    return np.sum(sources, axis=0, dtype=np.int16) if additive else x, np.stack(sources)


# --- validation


@dataclass(frozen=True)
class Validation:
    """A frozen set of items: which chunk, and its centre crop of `segment` samples. Every item is
    scored."""

    url: str
    task: Any
    sample_rate: int
    segment: int
    items: tuple[tuple[str, str, int, int], ...]
    """(key and start of the chunk for people, shard, row group, row)."""

    @property
    def listing(self) -> dict[str, Any]:
        """As written to validation-<hash>.json and hashed."""
        return {
            "segment": self.segment,
            "sample_rate": self.sample_rate,
            "task": {"name": type(self.task).__name__, **public(self.task)},
            "items": [
                dict(zip(("chunk", "shard", "row_group", "row"), i, strict=True))
                for i in self.items
            ],
        }

    def load(self, rank: int = 0, world: int = 1) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(item number, input (C, T), target (S, C, T)) of every `world`-th item from `rank`,
        int16."""
        reader = _Reader(self.url, self.task, self.sample_rate)
        return [
            (number, *reader.centre_crop(*self.items[number][1:], self.segment))
            for number in range(rank, len(self.items), world)
        ]


class _Reader:
    """Examples without randomness from single chunks; keeps the row group that was read last."""

    def __init__(self, url: str, task: Any, sample_rate: int):
        self.task = task

        @functools.lru_cache(maxsize=2)
        def chunks(shard: str, group: int) -> list[Chunk]:
            rows = shards.read_row_group(url, shard, group, voices=task.voices)
            return [Chunk(row, sample_rate) for row in rows]

        self._chunks = chunks

    def centre_crop(
        self, shard: str, group: int, row: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.task.example(self._chunks(shard, group), row, None, length)


def public(task: Any) -> dict[str, Any]:
    """What a task was told, without what it keeps for itself."""
    return {name: value for name, value in vars(task).items() if not name.startswith("_")}


SILENCE_DBFS = -60.0
"""A target crop with less RMS than this is no validation item: relative distances to silence have
no meaning."""


def audible(sound: np.ndarray) -> bool:
    """Whether float samples, full scale 1, are louder than what counts as silence."""
    return bool(np.sqrt(np.mean(np.square(sound))) >= 10 ** (SILENCE_DBFS / 20))


def validation_set(
    manifest: "shards.Manifest", url: str, task: Any, segment: int, items: int
) -> Validation:
    """At most `items` chunks of the validation split, evenly spaced in the order of their keys;
    crops that are silent, or that `task.scorable` refuses, are left out.

    ConfigError when every crop is silent.
    """
    chunks = []
    for shard in manifest.shards:
        if shard.split == "validation":
            for group in range(shard.row_groups):
                for row, r in enumerate(shards.read_row_group(url, shard.name, group, voices=())):
                    chunks.append((r.key, r.start, shard.name, group, row))
    chunks.sort()
    reader = _Reader(url, task, manifest.sample_rate)
    count = min(items, len(chunks))
    # Evenly spaced ones first; the others stand in, in order, where one of them is silent.
    first = [i * len(chunks) // count for i in range(count)]
    picked: list[int] = []
    scorable = getattr(task, "scorable", lambda inputs, targets: True)
    for i in [*first, *sorted(set(range(len(chunks))) - set(first))]:
        if len(picked) == count:
            break
        _, _, shard, group, row = chunks[i]
        crop = reader.centre_crop(shard, group, row, segment)
        if audible(crop[1] / task.full_scale) and scorable(*crop):
            picked.append(i)
    if not picked:
        text = f"all {len(chunks)} validation crops of {segment} samples are silent, or hold "
        raise ConfigError(url, [("", text + "nothing to score")])
    return Validation(
        url=url,
        task=task,
        sample_rate=manifest.sample_rate,
        segment=segment,
        items=tuple((f"{chunks[i][0]} @{chunks[i][1]}", *chunks[i][2:]) for i in sorted(picked)),
    )


def training_recipe(manifest: "shards.Manifest", url: str, task: Any, **options: Any) -> Recipe:
    """The recipe over the training split of a manifest; `options` are Recipe's remaining fields."""
    groups = [
        (s.name, g) for s in manifest.shards if s.split == "train" for g in range(s.row_groups)
    ]
    return Recipe(
        url=url,
        groups=tuple(groups),
        task=task,
        sample_rate=manifest.sample_rate,
        data_hash=manifest.hash,
        **options,
    )
