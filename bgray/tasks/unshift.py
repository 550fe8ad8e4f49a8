"""Undoing an up-shift: the input is audio shifted up in pitch, the target is the original (log
002)."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bgray.augment.low_pass import band_limit, reach
from bgray.augment.pitch_shift import CONTEXT_SECONDS, pitch_shift
from bgray.encoding import to_int16, wav
from bgray.tasks.scoring import restoration_scorer

if TYPE_CHECKING:
    from torch import Tensor

    from bgray.data import Chunk


class Unshift:
    """Input (C, T): the original shifted up by `semitones`; target (1, C, T): the original.

    The top octave of the target is absent from the input (for 12 semitones), so this is bandwidth
    extension as much as pitch shifting. The shift is Signalsmith Stretch's, latency-compensated.

    semitones: of the shift that is to be undone; of several, each training example draws one, and
      validation uses the last.
    shift: `prepared` reads the column that `python -m bgray.shards --shift` wrote (cheap: one
      decode); `on_the_fly` shifts every crop anew (about 12 ms of CPU for 0.7 s at 48 kHz, edges
      with context).
    band_limit_target: the target without what an up-shift pushes above Nyquist: from
      Nyquist * 2**(-semitones/12) on it is 80 dB down, by a linear-phase filter without delay
      (`bgray.augment.low_pass.band_limit`). Scores then compare with that target.
    """

    default_loss: ClassVar[Mapping[str, float]] = {"multi_mel": 1.0, "l1": 10.0}
    data_defaults: ClassVar[Mapping[str, Any]] = {}
    kind: ClassVar[Literal["audio", "roll"]] = "audio"
    full_scale: ClassVar[float] = 32768.0
    sources: ClassVar[tuple[str, ...]] = ("restored",)
    additive: ClassVar[bool] = False
    scores: ClassVar[Mapping[str, Literal["min", "max"]]] = {"val_stft": "min", "val_si_sdr": "max"}
    """Per-item validation metrics and which way is better: STFT distance (log 001's), SI-SDR in
    dB."""
    stems: ClassVar[bool] = False
    round_trips: ClassVar[tuple[float, ...]] = ()

    def __init__(
        self,
        *,
        semitones: float | tuple[float, ...] = 12.0,
        shift: Literal["prepared", "on_the_fly"] = "prepared",
        band_limit_target: bool = False,
    ):
        self._drawn = semitones if isinstance(semitones, tuple) else (semitones,)
        # Of several shifts only the last belongs to what validation compares.
        self.semitones, self.shift = self._drawn[-1], shift
        self.band_limit_target = band_limit_target

    @staticmethod
    def check(
        *, semitones: float | tuple[float, ...], shift: str, band_limit_target: bool
    ) -> Iterator[tuple[str, str]]:
        drawn = semitones if isinstance(semitones, tuple) else (semitones,)
        if not drawn:
            yield "semitones", "is empty; give at least one"
        for value in drawn:
            if not 0 < abs(value) <= 24:
                yield "semitones", f"must be within 24 of 0 and not 0, got {value:g}"
        if len(set(drawn)) < len(drawn):
            yield "semitones", f"names one twice: {', '.join(f'{s:g}' for s in drawn)}"
        if band_limit_target and drawn and max(drawn) <= 0:
            yield (
                "band_limit_target",
                "has no effect: only a shift up loses the highest frequencies",
            )

    @property
    def shifts(self) -> tuple[float, ...]:
        """Semitones of the shifted columns this task reads from the shards."""
        return self._drawn if self.shift == "prepared" else ()

    @property
    def voices(self) -> tuple[str, ...]:
        """Shard columns this task reads."""
        return ("audio", *(f"shift_{s:g}" for s in self.shifts))

    def example(
        self, chunks: "list[Chunk]", index: int, rng: np.random.Generator | None, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input (C, T) and target (S, C, T) from chunk `index`, int16; without `rng` the centre
        crop."""
        chunk = chunks[index]
        start = chunk.crop_start(length, rng)
        semitones = self.semitones
        if rng is not None and len(self._drawn) > 1:
            semitones = self._drawn[rng.integers(len(self._drawn))]
        target = self._target(chunk, start, length, semitones)[None]  # (1, C, T)
        if self.shift == "prepared":
            return chunk.crop(f"shift_{semitones:g}", start, length), target
        context = round(CONTEXT_SECONDS * chunk.sample_rate)
        wide = chunk.crop("audio", start - context, length + 2 * context)  # zeros beyond the chunk
        shifted = pitch_shift(wide.astype(np.float32) / 32768, semitones, chunk.sample_rate)
        return to_int16(shifted[:, context : context + length]), target

    def _target(self, chunk: "Chunk", start: int, length: int, semitones: float) -> np.ndarray:
        """(C, T) int16."""
        cutoff_hz = chunk.sample_rate / 2 * 2 ** (-semitones / 12)  # what is above it was lost
        if not self.band_limit_target or semitones < 0:
            return chunk.crop("audio", start, length)
        edge = reach(cutoff_hz, chunk.sample_rate)
        wide = chunk.crop("audio", start - edge, length + 2 * edge)
        limited = band_limit(wide.astype(np.float32) / 32768, cutoff_hz, chunk.sample_rate)
        return to_int16(limited[:, edge : edge + length])

    def baseline(self, inputs: "Tensor") -> "Tensor":
        """What doing nothing gives: (B, C, T) -> (B, 1, C, T). A model that scores worse is
        useless."""
        return inputs[:, None]

    def scorer(self, sample_rate: int) -> "Callable[[Tensor, Tensor], dict[str, Tensor]]":
        """A function of one item, (1, S, C, T) estimate and target -> its scores as 0-d tensors."""
        return restoration_scorer(sample_rate)

    def clips(self, audio: np.ndarray, sample_rate: int) -> dict[str, bytes]:
        """(C, T) float32 as files for people, by suffix."""
        return {".wav": wav(to_int16(audio), sample_rate)}
