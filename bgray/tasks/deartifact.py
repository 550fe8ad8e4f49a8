"""Removing what pitch shifting leaves behind: the input was shifted there and back, the target is
the original (log 001)."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bgray.augment.low_pass import low_pass
from bgray.augment.pitch_shift import CONTEXT_SECONDS, pitch_shift
from bgray.encoding import to_int16, wav
from bgray.tasks.scoring import restoration_scorer

if TYPE_CHECKING:
    from torch import Tensor

    from bgray.data import Chunk

VALIDATION_SEMITONES = 12.0


class Deartifact:
    """Input (C, T): the original shifted by s semitones and by -s; target (1, C, T): the original.

    A shift up loses what it pushes above Nyquist. So for s > 0 both are low-passed at
    Nyquist * 2**(-s/12), or a model would mostly learn to invent the top octave. The filter delays
    both alike. Validation is always s = 12.

    low, high: s is drawn uniformly from the integers low to high, both included; 0 leaves the input
      as it is. For `on_the_fly`.
    passes: how often the low-pass (a biquad, 3 dB down a pass) is applied; log 001 went from 1 to
      6 to 10.
    shift: `on_the_fly` shifts every crop twice, the dearest work of a loader; `prepared` reads
      columns with the shifted copies (much cheaper, but s only from `pool`).
    pool: the s that `prepared` draws from; validation needs the 12.
    reuse: `on_the_fly` shifts a window of twice the length once and cuts about so many examples
      from it, spread over the unit's batches: 1 shifts each example anew. More than a chunk's
      examples in a unit means one window a chunk. An example of 1 s at 48 kHz takes 28 ms of CPU
      at 1, 22 at 2, 12 at 4 and 7 at 8; prepared 3.
    """

    default_loss: ClassVar[Mapping[str, float]] = {"mrstft": 1.0}
    data_defaults: ClassVar[Mapping[str, Any]] = {}
    kind: ClassVar[Literal["audio", "roll"]] = "audio"
    full_scale: ClassVar[float] = 32768.0
    sources: ClassVar[tuple[str, ...]] = ("restored",)
    additive: ClassVar[bool] = False
    scores: ClassVar[Mapping[str, Literal["min", "max"]]] = {"val_stft": "min", "val_si_sdr": "max"}
    stems: ClassVar[bool] = False
    shifts: ClassVar[tuple[float, ...]] = ()

    def __init__(
        self,
        *,
        low: int = -12,
        high: int = 12,
        passes: int = 10,
        shift: Literal["on_the_fly", "prepared"] = "on_the_fly",
        pool: tuple[float, ...] = (-12.0, -7.0, -3.0, 3.0, 7.0, 12.0),
        reuse: int = 1,
    ):
        self.passes, self.shift = passes, shift
        # Underscored: of training alone, no part of what validation compares.
        self._low, self._high, self._pool, self._reuse = low, high, pool, reuse

    @staticmethod
    def check(
        *, low: int, high: int, passes: int, shift: str, pool: tuple[float, ...], reuse: int
    ) -> Iterator[tuple[str, str]]:
        for name, value in (("low", low), ("high", high)):
            if abs(value) > 24:
                yield name, f"must be within 24 of 0, got {value}"
        if low > high:
            yield "low", f"must not be above high ({high}), got {low}"
        for name, value, least in (("passes", passes, 0), ("reuse", reuse, 1)):
            if value < least:
                yield name, f"must be at least {least}, got {value}"
        if shift == "on_the_fly":
            return
        if reuse > 1:
            yield "reuse", "has no effect with shift: prepared; leave it out"
        if VALIDATION_SEMITONES not in pool:
            yield "pool", f"must contain 12, which validation uses, got {list(pool)}"
        if not all(0 < abs(s) <= 24 for s in pool):
            yield "pool", f"must be within 24 of 0 and not 0, got {list(pool)}"
        if len(set(pool)) < len(pool):
            yield "pool", f"names one twice: {list(pool)}"

    @property
    def round_trips(self) -> tuple[float, ...]:
        """Semitones of the columns, shifted there and back, that this task reads."""
        return self._pool if self.shift == "prepared" else ()

    @property
    def voices(self) -> tuple[str, ...]:
        """Shard columns this task reads."""
        return ("audio", *(f"roundtrip_{s:g}" for s in self.round_trips))

    def example(
        self, chunks: "list[Chunk]", index: int, rng: np.random.Generator | None, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input (C, T) and target (S, C, T) from chunk `index`, int16; without `rng` the centre
        crop, shifted by an octave."""
        chunk = chunks[index]
        if rng is None or self._reuse == 1:
            start = chunk.crop_start(length, rng)
            pair = self._pair(chunk, start, length, self._draw_semitones(rng))
        else:
            windows = max(1, round(chunk.uses / self._reuse))
            number = int(rng.integers(windows))
            window = chunk.cached(
                ("deartifact", number), lambda: self._window(chunk, number, length)
            )  # (2, C, up to 2 T)
            start = int(rng.integers(window.shape[-1] - length + 1))
            pair = window[..., start : start + length]
        return pair[0], pair[1:]

    def _window(self, chunk: "Chunk", number: int, length: int) -> np.ndarray:
        # The chunk's own generator, not the example's: whichever rank asks first, and for which
        # example, must not matter.
        rng = np.random.default_rng([*chunk.key, number])
        width = max(length, min(2 * length, chunk.frames))
        return self._pair(chunk, chunk.crop_start(width, rng), width, self._draw_semitones(rng))

    def _draw_semitones(self, rng: np.random.Generator | None) -> float:
        if rng is None:
            return VALIDATION_SEMITONES
        if self.shift == "prepared":
            return self._pool[rng.integers(len(self._pool))]
        return float(rng.integers(self._low, self._high + 1))

    def _pair(self, chunk: "Chunk", start: int, length: int, semitones: float) -> np.ndarray:
        """Input and target of `length` samples from `start`, (2, C, T) int16."""
        context = round(CONTEXT_SECONDS * chunk.sample_rate)
        place = (start - context, length + 2 * context)  # zeros beyond the chunk
        target = chunk.crop("audio", *place).astype(np.float32) / 32768
        if self.shift == "prepared":
            shifted = chunk.crop(f"roundtrip_{semitones:g}", *place).astype(np.float32) / 32768
        else:
            there = pitch_shift(target, semitones, chunk.sample_rate)
            shifted = pitch_shift(there, -semitones, chunk.sample_rate)
        pair = np.stack([shifted, target])  # (2, C, T)
        if semitones > 0 and self.passes:
            cutoff_hz = chunk.sample_rate / 2 * 2 ** (-semitones / 12)
            pair = low_pass(pair, cutoff_hz, chunk.sample_rate, self.passes)
        return to_int16(pair[..., context : context + length])

    def baseline(self, inputs: "Tensor") -> "Tensor":
        """What doing nothing gives: (B, C, T) -> (B, 1, C, T)."""
        return inputs[:, None]

    def scorer(self, sample_rate: int) -> "Callable[[Tensor, Tensor], dict[str, Tensor]]":
        """A function of one item, (1, S, C, T) estimate and target -> its scores as 0-d tensors."""
        return restoration_scorer(sample_rate)

    def clips(self, audio: np.ndarray, sample_rate: int) -> dict[str, bytes]:
        """(C, T) float32 as files for people, by suffix."""
        return {".wav": wav(to_int16(audio), sample_rate)}
