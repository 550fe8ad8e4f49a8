"""The clips of a sweep that can be heard side by side: which there are, how loud they are."""

import functools
import hashlib
import io
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import soundfile

from bgray import storage
from bgray.hearing import Level, Mode, level_of

NAME = re.compile(r"(\d{3,})-(input|target|step-(\d+))(?:-([^/\\]+?))?\.(wav|png|mid)")
TYPES = {"wav": "audio/wav", "png": "image/png", "mid": "audio/midi"}
Kind = Literal["target", "input"]


class Trial(Protocol):
    """One run, as far as it can be listened to."""

    @property
    def id(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def clips(self) -> tuple[str, ...]:
        """File names in its folder clips/; nothing else of it is served."""
        ...

    @property
    def scores(self) -> Mapping[int, Mapping[str, Sequence[float | None]]]:
        """Step to score to one value per validation item."""
        ...


class Source(Protocol):
    """One sweep, as far as it can be listened to."""

    @property
    def url(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def runs(self) -> Sequence[Trial]: ...
    @property
    def baseline(self) -> str | None: ...
    @property
    def metric(self) -> str | None: ...
    @property
    def mode(self) -> Mode | None: ...


@dataclass(frozen=True)
class Clip:
    """One file of one run."""

    run: Trial
    name: str

    @property
    def picture(self) -> str | None:
        """A picture of the same, where the run has one (piano rolls)."""
        name = self.name.removesuffix(".wav") + ".png"
        return name if name in self.run.clips else None


Place = tuple[int, int | str, str | None]
"""(item, step or "target" or "input", source or None)."""


def files(run: Trial) -> dict[Place, str]:
    """The WAV files of a run by what they are."""
    found: dict[Place, str] = {}
    for name in run.clips:
        match = NAME.fullmatch(name)
        if match and match[5] == "wav":
            found[int(match[1]), int(match[3]) if match[3] else match[2], match[4]] = name
    return found


def clip(run: Trial, item: int, at: int | str, source: str | None) -> Clip | None:
    """A run's output of an item at step `at`; or its "target"; or the "input", which all sources
    have in common."""
    name = files(run).get((item, at, None if at == "input" else source))
    return Clip(run, name) if name else None


@dataclass(frozen=True)
class Choice:
    """What is heard together, and what else could be."""

    lanes: tuple[Clip, ...]
    """One per variant, in the order asked for, without those that are missing."""
    references: dict[str, Clip]
    """ "target" and "input", as far as there are files."""
    item: int | None
    items: tuple[int, ...]
    source: str | None
    sources: tuple[str | None, ...]
    step: int | None
    steps: tuple[int, ...]
    """At which all lanes have this clip."""
    seed: int | None
    """None where the lanes have no seed in common."""
    seeds: tuple[int, ...]
    missing: tuple[tuple[str, str], ...]
    """(label of a variant, why it is not among the lanes)."""


def choose(
    runs: Iterable[Trial],
    variants: Sequence[str],
    *,
    item: int | None = None,
    source: str | None = None,
    step: int | None = None,
    seed: int | None = None,
) -> Choice:
    """One clip of all `variants`, by one seed and at one step: as asked for where that is there,
    otherwise the first clip, the lowest common seed and the last common step."""
    by_variant: dict[str, dict[int, Trial]] = {variant: {} for variant in variants}
    labels: dict[str, str] = {}
    outputs: dict[str, dict[Place, str]] = {}
    for run in runs:
        if run.variant in by_variant:
            labels[run.variant] = run.label
            of_run = {place: name for place, name in files(run).items() if type(place[1]) is int}
            if of_run:
                outputs[run.id] = of_run
                by_variant[run.variant][run.seed] = run
    missing = [(labels.get(v, v), "no clips yet") for v, there in by_variant.items() if not there]
    there = {v: of_seed for v, of_seed in by_variant.items() if of_seed}
    seeds = _common(of_seed for of_seed in there.values())
    chosen = seed if seed in seeds else min(seeds, default=None)
    own = {v: min(s) if chosen is None else chosen for v, s in there.items()}
    picked = [there[v][own[v]] for v in there]

    places = [outputs[run.id] for run in picked]
    items = _common({i for i, _, _ in p} for p in places)
    if not items:
        items = sorted({i for p in places for i, _, _ in p})
    number = item if item in items else next(iter(items), None)
    sources = _common({s: None for i, _, s in p if i == number} for p in places)
    voice = source if source in sources else next(iter(sources), None)
    steps = _common({int(a) for i, a, s in p if (i, s) == (number, voice)} for p in places)
    at = step if step in steps else max(steps, default=None)
    lanes, references = [], {}
    if number is not None:
        for run in picked:
            found = clip(run, number, at, voice) if at is not None else None
            if found:
                lanes.append(found)
            else:
                missing.append((run.label, "has this clip at no step that all others have"))
        for kind in ("target", "input"):
            found = [clip(run, number, kind, voice) for run in picked]
            first = next((one for one in found if one is not None), None)
            if first is not None:
                references[kind] = first
    return Choice(
        tuple(lanes),
        references,
        number,
        tuple(items),
        voice,
        tuple(sources),
        at,
        tuple(steps),
        chosen,
        tuple(seeds),
        tuple(missing),
    )


def _common(groups: Iterable[Iterable[Any]]) -> list[Any]:
    """What is in every group, in order of the first one if that is not sortable."""
    first, *rest = [list(group) for group in groups] or [[]]
    found = [one for one in first if all(one in group for group in rest)]
    return sorted(found, key=lambda one: (one is None, one if one is not None else 0))


# --- files

LEVELS: dict[tuple[str, str], Level] = {}
"""By file and version: to measure it takes longer than to read it."""
MOST_LEVELS = 4096

REMOTE_SECONDS = 600
"""How long a remote clip counts as what it was; a local one is looked at each time."""


def content(url: str) -> bytes:
    """A clip's file. The page, loudness and blind tests ask for the same one in turn."""
    if storage.is_remote(url):
        return _remote(url, int(time.monotonic() / REMOTE_SECONDS))
    return storage.read_bytes(url)


@functools.lru_cache(maxsize=48)  # some 300 kB each
def _remote(url: str, _period: int) -> bytes:
    return storage.read_bytes(url)


def url_of(one: Clip, name: str | None = None) -> str:
    return storage.join(one.run.url, "clips", name or one.name)


def version(one: Clip, name: str | None = None) -> str:
    """Of its file, or of `name` beside it: differs when that has been written anew; "0" where there
    is none."""
    url = url_of(one, name)
    try:
        if storage.is_remote(url):  # by what is in it: that is read for its loudness anyway
            return hashlib.blake2b(content(url), digest_size=12).hexdigest()
        there = os.stat(url)
    except OSError:
        return "0"
    return f"{there.st_mtime_ns:x}-{there.st_size:x}"


def samples(one: Clip) -> tuple[np.ndarray, int]:
    """(T, C) float32 and the sample rate; OSError, or ValueError where it is no sound."""
    try:
        audio, rate = soundfile.read(
            io.BytesIO(content(url_of(one))), dtype="float32", always_2d=True
        )
    except soundfile.SoundFileError as error:
        # Its text begins with an address in memory, which is another one each time.
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise ValueError(f"{one.run.id}/clips/{one.name}: {reason}") from error
    return audio, rate


def level(one: Clip) -> Level:
    """How loud a clip is; OSError, or ValueError where it is no sound."""
    url, stamp = url_of(one), version(one)
    found = LEVELS.get((url, stamp))
    if found is None:
        found = level_of(*samples(one))
        while len(LEVELS) >= MOST_LEVELS:
            LEVELS.pop(next(iter(LEVELS)), None)
        LEVELS[url, stamp] = found
    return found
