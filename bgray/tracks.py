"""Full-length tracks, read when asked for: from shards, folders of stem folders, built-in songs.

A track's stems are what separation is scored on. `audio` is their sum, as it is in shards; a
`mixture.*` beside the stems is not read.
"""

import dataclasses
import importlib.metadata
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import yaml

from bgray import band, layouts, shards, storage
from bgray.config import ConfigError

AUDIO = "audio"
LARGEST_DIFFERENCE_SECONDS = 0.1  # between the lengths of a track's stems


def musdb_validation() -> list[str]:
    """Titles of MUSDB18's 14 validation tracks, as the package musdb lists them; read without
    importing it, which fails on a machine without ffmpeg."""
    file = importlib.metadata.distribution("musdb").locate_file("musdb/configs/mus.yaml")
    return yaml.safe_load(Path(str(file)).read_text())["validation_tracks"]


@dataclass(frozen=True)
class Track:
    """One song; small and picklable, for the sound stays where it is."""

    name: str
    sample_rate: int
    channels: int
    frames: int
    """Samples per channel that `load` returns; see `head`."""
    voices: tuple[str, ...]
    """What `load` takes; `audio` is the first."""
    place: "ShardPlace | FolderPlace | SongPlace"
    content: str
    """Differs where the sound does: the shards' hash, files' sizes and times, a song's seed."""

    @property
    def stems(self) -> tuple[str, ...]:
        """The voices that add up to `audio`."""
        variants = layouts.RESERVED_BEGINNINGS
        return tuple(v for v in self.voices if v != AUDIO and not v.startswith(variants))

    def load(self, voices: Sequence[str]) -> np.ndarray:
        """(V, C, frames) float32, in the order of `voices`; read anew at each call.

        ConfigError names voices that are not there, and files that cannot be read.
        """
        if unknown := [voice for voice in voices if voice not in self.voices]:
            there = ", ".join(self.voices)
            problems = [(voice, f"no such voice; there is {there}") for voice in unknown]
            raise ConfigError(self.name, problems)
        out = np.zeros((len(voices), self.channels, self.frames), np.float32)
        self.place.read(self, voices, out)
        return out

    def head(self, seconds: float | None) -> "Track":
        """The same track cut to its first `seconds`; None: all of it."""
        if seconds is None:
            return self
        frames = min(self.frames, max(1, round(seconds * self.sample_rate)))
        return dataclasses.replace(self, frames=frames)


def find(source: str, *, split: str = "validation") -> list[Track]:
    """The tracks at a folder or s3:// prefix, in the order of their names; ConfigError if none.

    Shards are known by their manifest, and only their `split` is read; else every folder below
    that holds audio is a track (MUSDB18-HQ: `train/<track>/{bass,drums,other,vocals}.wav`).
    """
    if not storage.is_remote(source):  # tracks are read by workers in other folders too
        source = str(Path(source).expanduser().absolute())
    if storage.exists(shards.manifest_url(source)):
        return from_shards(source, split)
    return from_folder(source)


# --- prepared shards


@dataclass(frozen=True)
class ShardPlace:
    """Chunks of one key: (shard, row group, row, start, frames), ascending and without gaps."""

    url: str
    chunks: tuple[tuple[str, int, int, int, int], ...]

    def read(self, track: Track, voices: Sequence[str], out: np.ndarray) -> None:
        groups: dict[tuple[str, int], list[shards.Row]] = {}
        columns = list(dict.fromkeys(voices))
        for shard, group, index, start, frames in self.chunks:
            if start >= track.frames:
                break
            if (shard, group) not in groups:
                groups = {(shard, group): shards.read_row_group(self.url, shard, group, columns)}
            row = groups[shard, group][index]
            end = min(start + frames, track.frames)
            for i, voice in enumerate(voices):
                audio = shards.decode_voice(row, voice)[:, : end - start]
                out[i, :, start:end] = audio.astype(np.float32) / 32768


def from_shards(url: str, split: str = "validation") -> list[Track]:
    """A split's source files, each put together again from its chunks."""
    manifest = shards.read_manifest(url)
    chunks: dict[str, list[tuple[str, int, int, int, int]]] = {}
    for shard in manifest.shards:
        if shard.split == split:
            for group in range(shard.row_groups):
                rows = shards.read_row_group(url, shard.name, group, voices=())
                for index, row in enumerate(rows):
                    place = (shard.name, group, index, row.start, row.frames)
                    chunks.setdefault(row.key, []).append(place)
    if not chunks:
        raise ConfigError(url, [("", f"no {split} chunks; write the shards with another share")])
    tracks, problems = [], []
    for key, unsorted in sorted(chunks.items()):
        places = sorted(unsorted, key=lambda place: place[3])
        frames = 0
        for _, _, _, start, length in places:
            if start != frames:
                problems.append((key, f"samples {frames} to {start} are missing"))
                break
            frames += length
        place = ShardPlace(url, tuple(places))
        voices = (AUDIO, *(voice for voice in manifest.voices if voice != AUDIO))
        content = f"{manifest.hash} {key}"
        tracks.append(
            Track(key, manifest.sample_rate, manifest.channels, frames, voices, place, content)
        )
    if problems:
        raise ConfigError(url, problems)
    return tracks


# --- folders of stem folders


@dataclass(frozen=True)
class FolderPlace:
    """Audio files, each with the stem that it belongs to; several of one stem are added up."""

    files: tuple[tuple[str, str], ...]

    def read(self, track: Track, voices: Sequence[str], out: np.ndarray) -> None:
        wanted = {*voices} if AUDIO not in voices else {stem for stem, _ in self.files}
        for stem, path in self.files:
            if stem not in wanted:
                continue
            with _opened(path) as file:
                audio = file.read(track.frames, dtype="float32", always_2d=True).T  # (C or 1, T)
            for i, voice in enumerate(voices):
                if voice in (AUDIO, stem):  # mono stems are spread over the channels
                    out[i, :, : audio.shape[1]] += audio


def from_folder(source: str) -> list[Track]:
    """Every folder that holds stems (see `bgray.layouts`), at its own sample rate.

    Shorter stems are followed by silence, up to 0.1 s of it. A folder that is no track is a
    ConfigError, not left out: a score over the rest would look like a score over all.
    """
    items, unusable, _ = layouts.list_items(source, shards.Options(stems=True))
    if any(layouts.suffix(p.name) in layouts.MIDI_SUFFIXES for item in items for p in item.parts):
        text = f"holds MIDI, not sound; render it first: {shards.COMMAND} {source} SHARDS --stems"
        raise ConfigError(source, [("", text)])
    problems, found = list(unusable.items()), []
    for item in items:
        try:
            found.append(_folder_track(item))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(source, problems)
    return found


def _folder_track(item: layouts.Item) -> Track:
    files = tuple((part.stem, part.path) for part in item.parts)
    rates, channels, lengths = set(), set(), set()
    for _, path in files:
        with _opened(path) as file:
            rates.add(file.samplerate)
            channels.add(file.channels)
            lengths.add(file.frames)
    problems = []
    if len(rates) > 1:
        problems.append((item.key, f"its stems differ in sample rate: {sorted(rates)} Hz"))
    if len(channels - {1}) > 1:
        problems.append((item.key, f"its stems differ in channels: {sorted(channels)}"))
    if max(lengths) - min(lengths) > LARGEST_DIFFERENCE_SECONDS * min(rates):
        problems.append((item.key, f"its stems differ in length: {sorted(lengths)} samples"))
    if problems:
        raise ConfigError(item.key, problems)
    return Track(
        item.key,
        rates.pop(),
        max(channels),
        max(lengths),
        (AUDIO, *dict.fromkeys(stem for stem, _ in files)),
        FolderPlace(files),
        " ".join(f"{part.name} {part.size} {part.stamp}" for part in item.parts),
    )


def _opened(path: str) -> soundfile.SoundFile:
    try:
        if storage.is_remote(path):
            return soundfile.SoundFile(io.BytesIO(storage.read_bytes(path)))
        # As bytes: a name need not be UTF-8.
        return soundfile.SoundFile(os.fsencode(path))  # type: ignore[arg-type]
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise ConfigError(path, [(path, f"unreadable: {reason}")]) from None


# --- built-in music


@dataclass(frozen=True)
class SongPlace:
    """Song `index` of album `seed`, played at each read."""

    seed: int
    index: int
    seconds: float

    def read(self, track: Track, voices: Sequence[str], out: np.ndarray) -> None:
        song = band.song(self.seed, self.index, seconds=self.seconds, sample_rate=track.sample_rate)
        named = {band.PROGRAMS[program]: stem for program, stem in song.stems.items()}
        for i, voice in enumerate(voices):
            out[i] = (song.mixture if voice == AUDIO else named[voice])[:, : track.frames]


def builtin(
    songs: int, *, seconds: float = 20.0, sample_rate: int = 44_100, seed: int = 0
) -> list[Track]:
    """Mono songs of drums, piano, bass and strings; some of them rest in some songs."""
    voices = (AUDIO, *band.PROGRAMS.values())
    frames = max(1, round(seconds * sample_rate))
    return [
        Track(
            f"song-{index:05}",
            sample_rate,
            1,
            frames,
            voices,
            SongPlace(seed, index, seconds),
            f"band {band.VERSION} {seed} {index} {seconds:g} {sample_rate}",
        )
        for index in range(songs)
    ]
