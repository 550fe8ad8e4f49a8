"""Items of a source as voices: decoded sound, MIDI played by instrument, rolls, built-in songs."""

import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile

from bgray import midi, storage
from bgray.config import ConfigError
from bgray.layouts import MIDI_SUFFIXES, Item, Part, suffix
from bgray.shards import ROLL_BEATS, ROLL_CHANNELS, ROLL_RATE, Options

PIECE = round(ROLL_BEATS * ROLL_RATE)  # steps
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
class Clip:
    """An item at the shards' rate and channels: every voice (C, T) float32, a roll (P, T) uint8."""

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
    _check(headers, [part.stem for part in item.parts], options)
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


def is_midi(item: Item) -> bool:
    return any(suffix(part.name) in MIDI_SUFFIXES for part in item.parts)


def stem_names(item: Item) -> tuple[str, ...]:
    """The stems that an item has; of a MIDI file its instruments, so that it is read for them."""
    if item.song >= 0:
        from bgray.band import PROGRAMS

        return tuple(PROGRAMS.values())
    if not is_midi(item):
        return tuple(part.stem for part in item.parts)
    from bgray import rendering

    try:
        return rendering.instruments(read_bytes(item.parts[0]))
    except ValueError as error:
        raise Rejected(str(error)) from None


def read_clip(item: Item, options: Options, stems: Sequence[str]) -> Clip:
    """The whole item: `audio`, `stems`, variants; or `roll`. Rejected if it cannot be used."""
    if options.kind == "roll":
        return _roll(item, options)
    if item.song >= 0:
        return _song(item.song, options, stems)
    content, headers, sounds = hashlib.sha256(), [], []
    for part in item.parts:
        data = read_bytes(part)
        content.update(data)
        played = _play(data, options) if is_midi(item) else [(part.stem, *_decode(data, part))]
        for stem, header, audio in played:
            headers.append(header)
            sounds.append((stem, audio))
    _check(headers, [stem for stem, _ in sounds], options)
    length = max(audio.shape[1] for _, audio in sounds)
    rate, parts = headers[0].sample_rate, {}
    for stem, audio in sounds:
        where = f" in {stem}" if options.stems else ""
        if not np.isfinite(audio).all():
            raise Rejected("holds NaN or Inf" + where)
        if (peak := float(np.abs(audio).max())) > LARGEST_PEAK:
            raise Rejected(f"peak {peak:g}{where}: not on a full scale of 1.0")
        audio = _convert(_pad(audio, length), rate, options)  # (C, T)
        parts[stem] = parts[stem] + audio if stem in parts else audio
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


def _roll(item: Item, options: Options) -> Clip:
    if item.song >= 0:
        from bgray import band

        # What band.song would return, without a note being played.
        rng = np.random.default_rng([options.seed, item.song])
        score = band.compose(rng, options.seconds, tuple(band.PROGRAMS))
        whole = band.piano_roll(score.notes, score.tempo_bpm, score.seconds).T
        content, way_out = hashlib.sha256(whole.tobytes()), "; give more --seconds"
    else:
        data = read_bytes(item.parts[0])
        content, way_out = hashlib.sha256(data), ""
        try:
            whole = midi.read_roll(data)
        except ValueError as error:
            raise Rejected(str(error)) from None
    roll = midi.trim(whole)  # (P, T)
    if roll.shape[1] < PIECE:
        raise Rejected(f"{roll.shape[1]} steps, shorter than a piece of {PIECE}{way_out}")
    return Clip({"roll": roll}, ROLL_RATE, ROLL_CHANNELS, content.hexdigest(), 0.0)


def _play(data: bytes, options: Options) -> list[tuple[str, Header, np.ndarray]]:
    from bgray import rendering

    try:
        stems = rendering.render(data, options.soundfont, options.sample_rate)
    except ConfigError:  # a ValueError too, but no fault of this file
        raise
    except ValueError as error:
        raise Rejected(str(error)) from None
    return [
        (stem, Header(options.sample_rate, *audio.shape), audio) for stem, audio in stems.items()
    ]


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
    for name, how in options.variants.items():
        by = how["semitones"]
        voices[name] = pitch_shift(audio, by, options.sample_rate)
        if "round_trip" in how:
            voices[name] = pitch_shift(voices[name], -by, options.sample_rate)
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


def _check(headers: list[Header], stems: list[str], options: Options) -> None:
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
        by_length = sorted(zip(lengths, stems, strict=True))
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
