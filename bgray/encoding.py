"""How one voice of a chunk is stored as bytes: sound as FLAC, piano rolls as packed bits.

Lossless both; what is damaged does not decode. C channels, P pitches, T samples or steps.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import soundfile

ROLL_MAGIC = b"ROLL"
ROLL_HEADER = struct.Struct("<4sHI")  # magic, P, T


def to_int16(audio: Any) -> np.ndarray:
    """Float audio, full scale 1, as int16; what is louder is clipped, not rescaled."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)


def wav(audio: np.ndarray, sample_rate: int) -> bytes:
    """(C, T) as a WAV file: int16 as 16 bits, floats as float32, which nothing clips."""
    buffer = io.BytesIO()
    subtype = "PCM_16" if audio.dtype == np.int16 else "FLOAT"
    soundfile.write(buffer, audio.T, sample_rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


class Corrupt(ValueError):
    """Bytes that are no voice; the text is for people."""


def encode_flac(audio: np.ndarray, sample_rate: int) -> bytes:
    """int16 (C, T) -> a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, audio.T, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_flac(data: bytes) -> np.ndarray:
    """A FLAC file -> int16 (C, T)."""
    try:
        audio, _ = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise Corrupt(reason) from error
    return np.ascontiguousarray(audio.T)


def encode_roll(roll: np.ndarray) -> bytes:
    """(P, T) of 0 and 1 -> a header, then the bits of each pitch in turn, eight steps a byte,
    deflated with a checksum; a piece of 1920 steps comes to about 1 kB."""
    bits = np.packbits(roll.astype(bool), axis=1)
    return ROLL_HEADER.pack(ROLL_MAGIC, *roll.shape) + zlib.compress(bits.tobytes(), 9)


def decode_roll(data: bytes) -> np.ndarray:
    """What encode_roll made -> int16 (P, T) of 0 and 1."""
    try:
        _, pitches, steps = ROLL_HEADER.unpack_from(data)
        bits = np.frombuffer(zlib.decompress(data[ROLL_HEADER.size :]), np.uint8)
        roll = np.unpackbits(bits.reshape(pitches, -1), axis=1, count=steps)
    except (struct.error, zlib.error, ValueError) as error:
        raise Corrupt(f"no piano roll: {error}") from error
    return roll.astype(np.int16)
