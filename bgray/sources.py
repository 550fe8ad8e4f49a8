"""What shards are made of: audio files, folders of stems, built-in songs; read as voices.

With stems, a folder that holds audio is a track and its files are the stems; a `mixture.*` among
them is ignored, because `audio` is made as the stems' sum.
"""

import difflib
import hashlib
import io
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from bgray import storage
from bgray.config import ConfigError
from bgray.shards import PLAIN_COLUMNS, Options

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
SILENCE = 1e-4  # peak of full scale, -80 dB: dither is below it, music is not
LARGEST_PEAK = 8  # of floats: beyond it they are not on a full scale of 1
LOWEST_RATE_SHARE = 0.9  # 44.1 kHz may become 48 kHz: the missing 2 kHz are above hearing
LARGEST_STEM_DIFFERENCE_SECONDS = 0.1
# Files that encoders wrote whole miss the header's length by part of a frame or two.
MP3_SLACK_FRAMES = 2 * 1152
MP3_LARGEST_TAG = 16_384  # bytes after the sound
DECLARED_BYTES_UNKNOWN = 0x7FFF0000  # written by programs that stream to a pipe


class Rejected(Exception):
    """Why a file cannot be used; the reason is for people."""


@dataclass(frozen=True)
class Part:
    """One audio file."""

    path: str
    name: str
    """The source folder's relative path to it, printable."""
    stem: str
    size: int
    stamp: str
    """Changes when the content does: modification time or ETag."""


@dataclass(frozen=True)
class Item:
    """Used or rejected as a whole: a file, a track's stems, or a built-in song (no parts)."""

    key: str
    group: str
    parts: tuple[Part, ...]
    song: int = -1


@dataclass(frozen=True)
class Clip:
    """An item as sound at the shards' rate and channels: every voice (C, T) float32."""

    voices: dict[str, np.ndarray]
    source_rate: int
    source_channels: int
    sha256: str
    """Of the source files' bytes."""
    gain_db: float
    """0, or below where a voice would have clipped; the same for all voices."""
    muted: tuple[str, ...] = ()
    """Stems that are silent here, or that the track lacks."""


@dataclass(frozen=True)
class Header:
    sample_rate: int
    channels: int
    frames: int


# --- listing --------------------------------------------------------------------------------------


def list_items(source: str, options: Options) -> tuple[list[Item], dict[str, str], int]:
    """(items ordered by key, reasons against others, number of files that are not audio)."""
    if source == "builtin":
        from bgray import band

        try:  # what the band cannot play, it says at the first note
            band.song(
                options.seed, 0, seconds=min(1.0, options.seconds), sample_rate=options.sample_rate
            )
        except ValueError as error:
            raise ConfigError("built-in music", [("", str(error))]) from None
        keys = [f"song-{index:05}" for index in range(options.songs)]
        return [Item(key, key, (), index) for index, key in enumerate(keys)], {}, 0
    files = sorted(
        _remote(source) if storage.is_remote(source) else _local(source), key=lambda part: part.name
    )
    audio = [part for part in files if _suffix(part.name) in SUFFIXES]
    if not audio:
        others = Counter(_suffix(part.name) or "without suffix" for part in files)
        there = (
            ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "nothing"
        )
        text = f"no audio found (looked for {', '.join(SUFFIXES)}); there: {there}"
        raise ConfigError(source, [("", text)])
    items, rejected = (
        _tracks(audio, options) if options.stems else ([_file(part, options) for part in audio], {})
    )
    return items, rejected, len(files) - len(audio)


def _file(part: Part, options: Options) -> Item:
    return Item(part.name, _parent(part.name) if options.group == "folder" else part.name, (part,))


def _tracks(audio: list[Part], options: Options) -> tuple[list[Item], dict[str, str]]:
    folders = defaultdict(list)
    for part in audio:
        folders[_parent(part.name)].append(part)
    items, rejected = [], {}
    for key, parts in folders.items():
        group = _parent(key) if options.group == "folder" else key
        stems = tuple(part for part in parts if part.stem != "mixture")
        counts = Counter(part.stem for part in stems)
        reserved = [
            name
            for name in counts
            if name in (*PLAIN_COLUMNS, "audio") or name.startswith("shift_")
        ]
        if not stems:
            rejected[key] = "a mixture without stems"
        elif reserved:
            rejected[key] = f"a stem cannot be called '{reserved[0]}'; rename the file"
        elif max(counts.values()) > 1:
            rejected[key] = f"two files are stem '{counts.most_common(1)[0][0]}'"
        else:
            items.append(Item(key, group, stems))
    return items, rejected


def _local(source: str) -> Iterator[Part]:
    root = Path(source)
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        close = difflib.get_close_matches(root.name, near, 1)
        hint = (
            f"; did you mean {root.parent / close[0]}?"
            if close
            else "; give the folder that holds the audio"
        )
        raise ConfigError(source, [("", ("a file" if root.exists() else "no such folder") + hint)])

    def fail(error: OSError) -> None:
        raise ConfigError(source, [("", f"cannot list {error.filename}: {error.strerror}")])

    seen = set()
    # Linked folders are common in data sets; `seen` ends a link to a folder above itself.
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(folder, name)
            if (
                not name.startswith(".") and path.is_file()
            ):  # ._song.wav is a Mac's note about song.wav
                stat = path.stat()
                yield _part(
                    str(path),
                    path.relative_to(root).as_posix(),
                    stat.st_size,
                    str(stat.st_mtime_ns),
                )


def _remote(source: str) -> Iterator[Part]:
    try:
        with storage.plain_errors(source):
            fs, root = storage.filesystem(source)
            found = dict(fs.find(root, detail=True))
    except OSError as error:
        raise ConfigError(source, [("", f"cannot list it: {error}")]) from None
    for path, info in found.items():
        name = path.removeprefix(root).lstrip("/")
        if info["type"] == "file" and not any(piece.startswith(".") for piece in name.split("/")):
            yield _part(
                fs.unstrip_protocol(path),
                name,
                info["size"],
                str(info.get("ETag", info.get("mtime", ""))),
            )


def _part(path: str, name: str, size: int, stamp: str) -> Part:
    # A file name may hold bytes that are not UTF-8; Parquet and JSON cannot.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return Part(path, name, name.rsplit("/", 1)[-1].rsplit(".", 1)[0], size, stamp)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _parent(name: str) -> str:
    return name.rsplit("/", 1)[0] if "/" in name else "."


# --- reading --------------------------------------------------------------------------------------


def read_header(item: Item, options: Options) -> list[Header]:
    """The headers of an item's local files, undecoded; Rejected where they already rule it out."""
    headers = []
    for part in item.parts:
        try:
            # As bytes: a name need not be UTF-8.
            with soundfile.SoundFile(os.fsencode(part.path)) as file:  # type: ignore[arg-type]
                headers.append(_header(file))
        except (soundfile.SoundFileError, OSError) as error:
            raise Rejected(_unreadable(part, error)) from None
    _check(headers, item, options)
    return headers


def read_bytes(part: Part) -> bytes:
    """A local file that cannot be read is Rejected; an S3 error passes, and so it is raised."""
    try:
        return storage.read_bytes(part.path)
    except OSError as error:
        if storage.is_remote(part.path) and not isinstance(
            error, FileNotFoundError | PermissionError
        ):
            raise
        raise Rejected(_unreadable(part, error)) from None


def read_clip(item: Item, options: Options, stems: Sequence[str]) -> Clip:
    """The whole item: `audio`, `stems` and the shifted variants. Rejected if it cannot be used."""
    if item.song >= 0:
        return _song(item.song, options, stems)
    content, headers, parts = hashlib.sha256(), [], {}
    for part in item.parts:
        data = read_bytes(part)
        content.update(data)
        header, parts[part.stem] = _decode(data, part)
        headers.append(header)
    _check(headers, item, options)
    for stem, audio in parts.items():
        where = f" in {stem}" if options.stems else ""
        if not np.isfinite(audio).all():
            raise Rejected("holds NaN or Inf" + where)
        if (peak := float(np.abs(audio).max())) > LARGEST_PEAK:
            raise Rejected(f"peak {peak:g}{where}: not on a full scale of 1.0")
    length = max(audio.shape[1] for audio in parts.values())
    rate = headers[0].sample_rate
    parts = {s: _convert(_pad(a, length), rate, options) for s, a in parts.items()}  # (C, T)
    muted = ()
    if options.stems:
        parts = {
            s: parts[s] if s in parts else np.zeros_like(next(iter(parts.values()))) for s in stems
        }
        muted = tuple(s for s, audio in parts.items() if np.abs(audio).max() < SILENCE)
        audio = np.stack(list(parts.values())).sum(axis=0)  # (C, T)
    else:
        audio = parts.popitem()[1]
    voices, gain_db = _voices(audio, parts, options)
    return Clip(voices, rate, headers[0].channels, content.hexdigest(), gain_db, muted)


def _song(index: int, options: Options, stems: Sequence[str]) -> Clip:
    from bgray import band

    song = band.song(options.seed, index, seconds=options.seconds, sample_rate=options.sample_rate)
    channels = (options.channels, 1)
    named = {
        band.PROGRAMS[program]: np.tile(audio, channels) for program, audio in song.stems.items()
    }
    mixture = np.tile(song.mixture, channels)
    parts = {stem: named.get(stem, np.zeros_like(mixture)) for stem in stems}
    muted = tuple(stem for stem, audio in parts.items() if np.abs(audio).max() < SILENCE)
    content = hashlib.sha256(song.mixture.tobytes()).hexdigest()
    voices, gain_db = _voices(mixture, parts, options)
    return Clip(voices, options.sample_rate, 1, content, gain_db, muted)


def _voices(
    audio: np.ndarray, stems: dict[str, np.ndarray], options: Options
) -> tuple[dict[str, np.ndarray], float]:
    """(all voices, the gain in dB that keeps each of them within full scale)."""
    from bgray.augment.pitch_shift import pitch_shift

    if np.abs(audio).max() < SILENCE:
        raise Rejected("silent (peak below -80 dB of full scale)")
    voices = {"audio": audio, **stems}
    for by in options.shifts:
        voices[f"shift_{by:g}"] = pitch_shift(audio, by, options.sample_rate)
    peak = max(float(np.abs(voice).max()) for voice in voices.values())
    if peak <= 1:
        return voices, 0.0
    # One factor for all, or stems would no longer add up and shifts no longer match.
    return {name: voice / peak for name, voice in voices.items()}, -20 * math.log10(peak)


def _decode(data: bytes, part: Part) -> tuple[Header, np.ndarray]:
    """(header, (C, T) float32)."""
    stream = io.BytesIO(data)
    try:
        with soundfile.SoundFile(stream) as file:
            header = _header(file)
            audio = file.read(dtype="float32", always_2d=True)
            is_mp3, unread = file.format == "MP3", len(data) - stream.tell()
    except (soundfile.SoundFileError, MemoryError) as error:
        raise Rejected(_unreadable(part, error)) from None
    if len(audio) < header.frames - (MP3_SLACK_FRAMES if is_mp3 else 0):
        raise Rejected(f"truncated: {len(audio)} of {header.frames} frames")
    # libsndfile guesses the length of a variable-rate MP3 without a Xing header, and stops there.
    if is_mp3 and unread > max(len(data) // 10, MP3_LARGEST_TAG):
        raise Rejected(
            f"MP3 without its length: {unread / len(data):.0%} would be lost; re-encode it"
        )
    return Header(header.sample_rate, header.channels, len(audio)), np.ascontiguousarray(audio.T)


def _header(file: soundfile.SoundFile) -> Header:
    # libsndfile reads a cut WAV, AIFF or Ogg as a shorter one; only its log tells.
    for declared, there in re.findall(
        r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info
    ):
        if int(there) < int(declared) < DECLARED_BYTES_UNKNOWN:
            raise Rejected(f"truncated: {there} of {declared} bytes of sound")
    if "Junk after the last page" in file.extra_info:
        raise Rejected("truncated: the last Ogg page is cut")
    return Header(file.samplerate, file.channels, file.frames)


def _check(headers: list[Header], item: Item, options: Options) -> None:
    for header in headers:
        if header.frames <= 0:
            raise Rejected("empty")
        if header.sample_rate < LOWEST_RATE_SHARE * options.sample_rate and not options.upsample:
            raise Rejected(
                f"{header.sample_rate} Hz cannot fill {options.sample_rate} Hz; "
                f"use --sample-rate {header.sample_rate} or --upsample"
            )
        if options.channels != 1 and header.channels not in (1, options.channels):
            raise Rejected(
                f"{header.channels} channels cannot become {options.channels}; use --channels 1"
            )
    rates = sorted({header.sample_rate for header in headers})
    if len(rates) > 1:
        raise Rejected(f"its stems differ in sample rate: {', '.join(map(str, rates))} Hz")
    lengths = [header.frames / rates[0] for header in headers]
    if max(lengths) - min(lengths) > LARGEST_STEM_DIFFERENCE_SECONDS:
        by_length = sorted(zip(lengths, (part.stem for part in item.parts), strict=True))
        (low, short), (high, long) = by_length[0], by_length[-1]
        raise Rejected(f"its stems differ in length: {short} {low:.2f} s, {long} {high:.2f} s")
    if max(lengths) < options.min_seconds:
        raise Rejected(f"{max(lengths):.2f} s, shorter than --min-seconds {options.min_seconds:g}")


def _convert(audio: np.ndarray, rate: int, options: Options) -> np.ndarray:
    import soxr

    if options.channels == 1:
        audio = audio.mean(axis=0, keepdims=True)
    elif audio.shape[0] == 1:
        audio = audio.repeat(options.channels, axis=0)
    if rate != options.sample_rate:
        audio = soxr.resample(audio.T, rate, options.sample_rate, quality="HQ").T
    return audio


def _pad(audio: np.ndarray, length: int) -> np.ndarray:
    return np.pad(audio, ((0, 0), (0, length - audio.shape[1])))


def _unreadable(part: Part, error: BaseException) -> str:
    text = (
        getattr(error, "error_string", None)
        or getattr(error, "strerror", None)
        or str(error)
        or "too large"
    )
    if "possibly a pipe" in text:  # what libsndfile says about an MP3 without one valid frame
        text = "Format not recognised"
    return f"unreadable: {text.strip().rstrip('.')}" if part.size else "empty (0 bytes)"
