"""Reconstructing piano rolls: the target is the input, 88 keys on or off at each step (log 003)."""

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bgray.encoding import to_int16, wav
from bgray.midi import LOWEST_PITCH, write_midi

if TYPE_CHECKING:
    from torch import Tensor

    from bgray.data import Chunk

TEMPO_BPM = 120.0
"""Of clips; a roll counts steps, not seconds."""
CLIP_SAMPLE_RATE = 16_000
SURELY_OFF = -20.0
"""The logit of a level of 2e-9."""


class Pianoroll:
    """Input (P, T) and target (1, P, T): the same roll, 0 or 1, P = 88 keys, 24 steps a beat.

    A roll travels as audio with 88 channels does; its "sample rate" is steps per beat.

    estimate: what the model's output means: `logits` (the level is its sigmoid) or the `level`
      itself, 0 for a key that is up, 1 for one that is down.
    threshold: a level above it is a note, in the scores and in the clips.
    """

    default_loss: ClassVar[Mapping[str, float]] = {"bce_logits": 1.0}
    data_defaults: ClassVar[Mapping[str, Any]] = {
        "sample_rate": 24,
        "channels": 88,
        "segment": 1920,
        "builtin_seconds": 96.0,  # shorter songs do not fill a piece
    }
    kind: ClassVar[Literal["audio", "roll"]] = "roll"
    full_scale: ClassVar[float] = 1.0
    sources: ClassVar[tuple[str, ...]] = ("roll",)
    additive: ClassVar[bool] = False
    scores: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "val_f1": "max",
        "val_precision": "max",
        "val_recall": "max",
        "val_mse": "min",
    }
    stems: ClassVar[bool] = False
    shifts: ClassVar[tuple[float, ...]] = ()
    round_trips: ClassVar[tuple[float, ...]] = ()
    voices: ClassVar[tuple[str, ...]] = ("roll",)

    def __init__(self, *, estimate: Literal["logits", "level"] = "logits", threshold: float = 0.5):
        self.threshold = threshold
        # Underscored: models of either kind are compared by their levels, on the same validation.
        self._estimate = estimate

    @staticmethod
    def check(*, estimate: str, threshold: float) -> Iterator[tuple[str, str]]:
        if not 0 < threshold < 1:
            yield "threshold", f"must be between 0 and 1, got {threshold:g}"

    @property
    def estimate(self) -> str:
        """What the model's output means."""
        return self._estimate

    def example(
        self, chunks: "list[Chunk]", index: int, rng: np.random.Generator | None, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input (P, T) and target (1, P, T) from chunk `index`, int16; without `rng` the centre."""
        roll = chunks[index].crop("roll", chunks[index].crop_start(length, rng), length)
        return roll, roll[None]

    def baseline(self, inputs: "Tensor") -> "Tensor":
        """Silence, as (B, 1, P, T): its val_mse is the share of keys that are down, which a model
        reaches by learning nothing but that notes are rare."""
        off = SURELY_OFF if self.estimate == "logits" else 0.0
        return inputs.new_full((len(inputs), 1, *inputs.shape[1:]), off)

    def level(self, estimate: "Tensor") -> "Tensor":
        """What the model put out -> how much each key is down, 0 to 1 where it is `logits`."""
        return estimate.float().sigmoid() if self.estimate == "logits" else estimate.float()

    def _level_of(self, estimate: np.ndarray) -> np.ndarray:
        import torch

        return self.level(torch.from_numpy(estimate)).numpy()

    def notes(self, estimate: np.ndarray) -> np.ndarray:
        """What the model put out, (P, T), as the keys that are down: uint8 of 0 and 1."""
        level = self._level_of(estimate)
        return (level > self.threshold).astype(np.uint8)

    def scorer(self, sample_rate: int) -> "Callable[[Tensor, Tensor], dict[str, Tensor]]":
        """A function of one item, (1, 1, P, T) estimate and target -> its scores as 0-d tensors.

        A note here is a (key, step) that is down.
        val_precision: share of the predicted notes that are right; 1 where none is predicted.
        val_recall: share of the notes that are predicted; 1 where there is none.
        val_f1: their harmonic mean: 0 for an estimate of silence, but 1 where silence is right.
        val_mse: mean square error of the level.
        """
        import torch

        def score(estimate: "Tensor", target: "Tensor") -> "dict[str, Tensor]":
            with torch.no_grad():
                level, target = self.level(estimate), target.float()
                found, notes = level > self.threshold, target > 0.5
                hits = (found & notes).sum()
                return {
                    "val_f1": _ratio(2 * hits, found.sum() + notes.sum()),
                    "val_precision": _ratio(hits, found.sum()),
                    "val_recall": _ratio(hits, notes.sum()),
                    "val_mse": (level - target).square().mean(),
                }

        return score

    def clips(self, audio: np.ndarray, sample_rate: int) -> dict[str, bytes]:
        """(P, T) float32 as files for people, by suffix: MIDI, how a piano sounds at 120 bpm, and a
        picture of the levels, in which one sees what stays below the threshold."""
        level = np.asarray(audio, np.float32)
        # Inputs and targets come here too; they are nothing but zeros and ones.
        if not np.isin(level, (0, 1)).all():
            level = self._level_of(level)
        notes = (level > self.threshold).astype(np.uint8)  # (P, T)
        return {
            ".mid": write_midi(notes, TEMPO_BPM),
            ".wav": wav(to_int16(play(notes, sample_rate)), CLIP_SAMPLE_RATE),
            ".png": picture(level[::-1]),  # high notes on top
        }


def _ratio(part: "Tensor", whole: "Tensor") -> "Tensor":
    return (part / whole).where(whole > 0, 1.0)


def play(roll: np.ndarray, steps_per_beat: int) -> np.ndarray:
    """(P, T) of 0 and 1 as the built-in piano sounds, (1, samples) float32 at 16 kHz."""
    from bgray import band

    step = 60 / TEMPO_BPM / steps_per_beat  # seconds
    notes = []
    for row, keys in enumerate(np.diff(roll.astype(np.int8), axis=1, prepend=0, append=0)):
        starts, ends = np.flatnonzero(keys > 0), np.flatnonzero(keys < 0)
        notes += [
            band.Note(0, LOWEST_PITCH + row, start * step, (end - start) * step, 80)
            for start, end in zip(starts, ends, strict=True)
        ]
    seconds = roll.shape[1] * step
    score = band.Score(seconds, TEMPO_BPM, (0,), tuple(notes), timbre=0)
    sound = band.perform(score, 0, max(1, round(seconds * CLIP_SAMPLE_RATE)), CLIP_SAMPLE_RATE)
    return sound * np.float32(min(1.0, 0.9 / max(1e-9, float(np.abs(sound).max()))))


def picture(level: np.ndarray) -> bytes:
    """(P, T) of 0 to 1 as a PNG, one pixel a cell, white to black."""
    height, width = level.shape
    gray = np.rint(255 * (1 - level.clip(0, 1))).astype(np.uint8)
    rows = np.hstack([np.zeros((height, 1), np.uint8), gray])  # each starts with its filter, none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    blocks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in blocks
    )
