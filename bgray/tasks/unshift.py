"""Undoing an up-shift: the input is audio shifted up in pitch, the target is the original (log
002)."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bgray.augment.pitch_shift import pitch_shift
from bgray.losses.mrstft import MultiResolutionStft
from bgray.metrics import si_sdr

if TYPE_CHECKING:
    from bgray.data import Chunk

# Signalsmith's longest analysis window at 48 kHz is 120 ms; a crop shifted on the fly gets this
# much
# real signal on both sides, so that its edges sound like the middle.
CONTEXT_SECONDS = 0.25


class Unshift:
    """Input (C, T): the original shifted up by `semitones`; target (1, C, T): the original.

    The top octave of the target is absent from the input (for 12 semitones), so this is bandwidth
    extension as much as pitch shifting. The shift is Signalsmith Stretch's, latency-compensated.

    semitones: of the shift that is to be undone.
    shift: `prepared` reads the column that `python -m bgray.shards --shift` wrote (cheap: one
    decode);
      `on_the_fly` shifts every crop anew (about 12 ms of CPU for 0.7 s at 48 kHz, edges with
      context).
    """

    default_loss: ClassVar[Mapping[str, float]] = {"multi_mel": 1.0, "l1": 10.0}
    sources: ClassVar[tuple[str, ...]] = ("restored",)
    scores: ClassVar[Mapping[str, Literal["min", "max"]]] = {"val_stft": "min", "val_si_sdr": "max"}
    """Per-item validation metrics and which way is better: STFT distance (log 001's), SI-SDR in
    dB."""
    stems: ClassVar[bool] = False

    def __init__(
        self,
        *,
        semitones: float = 12.0,
        shift: Literal["prepared", "on_the_fly"] = "prepared",
    ):
        self.semitones, self.shift = semitones, shift

    @staticmethod
    def check(*, semitones: float, shift: str) -> list[tuple[str, str]]:
        if not 0 < abs(semitones) <= 24:
            return [("semitones", f"must be within 24 of 0 and not 0, got {semitones:g}")]
        return []

    @property
    def shifts(self) -> tuple[float, ...]:
        """Semitones of the shifted columns this task reads from the shards."""
        return (self.semitones,) if self.shift == "prepared" else ()

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
        target = chunk.crop("audio", start, length)[None]  # (1, C, T)
        if self.shift == "prepared":
            return chunk.crop(self.voices[1], start, length), target
        context = round(CONTEXT_SECONDS * chunk.sample_rate)
        wide = chunk.crop("audio", start - context, length + 2 * context)  # zeros beyond the chunk
        shifted = pitch_shift(wide.astype(np.float32) / 32768, self.semitones, chunk.sample_rate)
        shifted = np.clip(np.rint(shifted[:, context : context + length] * 32768), -32768, 32767)
        return shifted.astype(np.int16), target

    def baseline(self, inputs: Tensor) -> Tensor:
        """What doing nothing gives: (B, C, T) -> (B, 1, C, T). A model that scores worse is
        useless."""
        return inputs[:, None]

    def scorer(self, sample_rate: int) -> "Callable[[Tensor, Tensor], dict[str, Tensor]]":
        """A function of one item, (1, S, C, T) estimate and target -> its scores as 0-d tensors.

        Item by item, because spectral convergence over a batch would depend on who shares the
        batch.
        """
        distance = MultiResolutionStft(sample_rate=sample_rate)

        def score(estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return {
                    "val_stft": distance.to(estimate.device)(estimate, target),
                    "val_si_sdr": si_sdr(estimate, target).mean(),
                }

        return score
